// Grey pixels on a canvas, and the words below it.

/** Draws images (B, size, size), 0 .. 255, side by side in rows of `columns`. */
export function paint(canvas, pixels, size, columns = 1) {
  const count = pixels.length / size ** 2;
  const [width, height] = [size * Math.min(columns, count), size * Math.ceil(count / columns)];
  if (canvas.width !== width || canvas.height !== height) {
    Object.assign(canvas, { width, height });
  }
  const context = canvas.getContext("2d");
  for (let k = 0; k < count; k++) {
    const image = context.createImageData(size, size);
    for (let i = 0; i < size ** 2; i++) {
      image.data.fill(pixels[k * size ** 2 + i], 4 * i, 4 * i + 3);
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, size * (k % columns), size * Math.floor(k / columns));
  }
}

/** Returns a new figure: { figure, canvas, say }, where say sets the lines below the picture. */
export function makeFigure(label, title = "") {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: 1, height: 1 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  const caption = document.createElement("figcaption");
  const [head, detail] = [document.createElement("strong"), document.createElement("span")];
  head.textContent = title;
  caption.append(head, detail);
  figure.append(canvas, caption);
  return { figure, canvas, say: (text) => { detail.textContent = text; } };
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** "the teacher, 64 steps" or "student, 1 step". */
export function titleOf(model) {
  const who = model.name === "teacher" ? "teacher" : "student";
  return `${who}, ${plural(model.steps, "step")}`;
}

export const duration = (ms) => `${Math.round(ms).toLocaleString("en")} ms`;
