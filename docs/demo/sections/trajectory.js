// What a model sees and believes at each step: z_t and x_hat.

import { Cancelled } from "../engine.js";
import { normals } from "../noise.js";
import { makeFigure, paint, titleOf } from "../picture.js";
import { newest } from "../tasks.js";

const SHOWN = 8; // at most: of 64 steps, every eighth and the last

export function start(section, { engine, manifest, report }) {
  const size = manifest.image_size;
  const [select, button, strip] =
    ["select", "button", ".strip"].map((name) => section.querySelector(name));
  for (const model of manifest.models) select.add(new Option(titleOf(model), model.name));
  const preferred = manifest.models.find((model) => model.name !== "teacher");
  select.value = (preferred ?? manifest.models[0]).name;
  let seed = 1;

  const draw = newest(async (signal) => {
    const model = manifest.models.find((entry) => entry.name === select.value);
    const every = Math.max(1, Math.ceil(model.steps / SHOWN));
    strip.replaceChildren();
    const onStep = ({ n, z, x }) => {
      const last = n === model.steps - 1;
      if (signal.aborted || (n % every && !last)) return;
      strip.append(column(n, model.levels[n], z, x, size));
    };
    try {
      await engine.sample(model.name, normals(seed, size ** 2), { onStep, signal });
    } catch (error) {
      if (!signal.aborted && !(error instanceof Cancelled)) {
        const item = document.createElement("li");
        item.textContent = "not available";
        strip.replaceChildren(item);
      }
      throw error;
    }
  }, report);

  select.addEventListener("change", () => draw());
  button.addEventListener("click", () => {
    seed++;
    draw();
  });
  draw();
}

function column(n, logsnr, z, x, size) {
  const item = document.createElement("li");
  const [noisy, clean] = [`z before step ${n + 1}`, `x_hat of step ${n + 1}`].map((label, k) => {
    const made = makeFigure(label);
    made.canvas.className = k ? "clean" : "noisy";
    return made;
  });
  paint(noisy.canvas, z, size);
  paint(clean.canvas, x, size);
  noisy.say("z");
  clean.say("x\u0302");
  const head = document.createElement("p");
  head.textContent = `step ${n + 1}`;
  const level = document.createElement("p");
  level.className = "quiet";
  const rounded = Math.round(10 * logsnr) / 10 || 0; // never -0
  level.textContent = `logsnr ${rounded.toFixed(1).replace("-", "\u2212")}`;
  item.append(head, level, noisy.figure, clean.figure);
  return item;
}
