// The same noise, drawn by every model side by side.

import { Cancelled } from "../engine.js";
import { normals } from "../noise.js";
import { duration, makeFigure, paint, plural, titleOf } from "../picture.js";
import { newest } from "../tasks.js";

const DIGITS = 4; // for each model
const COLUMNS = 2;

export function start(section, { engine, manifest, report }) {
  const size = manifest.image_size;
  const button = section.querySelector("button");
  const figures = new Map();
  for (const model of manifest.models) {
    const title = titleOf(model);
    const made = makeFigure(`${plural(DIGITS, "digit")} by the ${title}`, title);
    made.canvas.dataset.model = model.name;
    made.say("waiting");
    figures.set(model.name, made);
    section.querySelector(".row").append(made.figure);
  }

  const draw = newest(async (signal, seed) => {
    const noise = normals(seed, DIGITS * size ** 2);
    for (const { say } of figures.values()) say("waiting");
    // The fastest first: they need one step, the teacher dozens.
    for (const model of [...manifest.models].reverse()) {
      const { canvas, say } = figures.get(model.name);
      const onStep = ({ n, x }) => {
        if (signal.aborted) return;
        paint(canvas, x, size, COLUMNS);
        say(`step ${n + 1} of ${model.steps}`);
      };
      try {
        const drawn = await engine.sample(model.name, noise, { onStep, signal });
        paint(canvas, drawn.pixels, size, COLUMNS);
        say(duration(drawn.ms));
      } catch (error) {
        if (error instanceof Cancelled) throw error;
        say("not available"); // the other models still draw
        report(error);
      }
    }
  }, report);

  let seed = 1;
  button.addEventListener("click", () => draw(++seed));
  draw(seed);
}
