// A slider over the numbers of steps, on a fixed seed.

import { Cancelled } from "../engine.js";
import { normals } from "../noise.js";
import { duration, paint, plural, titleOf } from "../picture.js";
import { newest } from "../tasks.js";

const SEED = 7;
const DIGITS = 6;
const COLUMNS = 6;

export function start(section, { engine, manifest, report }) {
  const size = manifest.image_size;
  const models = [...manifest.models].reverse(); // fewest steps first
  const [slider, output] = ["input", "output"].map((name) => section.querySelector(name));
  const canvas = section.querySelector("canvas");
  const noise = normals(SEED, DIGITS * size ** 2);
  const known = new Map(); // the seed is fixed: each picture is computed once
  slider.max = models.length - 1;

  const show = newest(async (signal) => {
    const model = models[slider.valueAsNumber];
    const title = titleOf(model);
    slider.setAttribute("aria-valuetext", plural(model.steps, "step"));
    canvas.setAttribute("aria-label", `${plural(DIGITS, "digit")} by the ${title}`);
    if (!known.has(model.name)) {
      output.textContent = `${title}: computing`;
      const onStep = ({ n, x }) => {
        if (signal.aborted) return;
        paint(canvas, x, size, COLUMNS);
        output.textContent = `${title}: step ${n + 1}`;
      };
      try {
        known.set(model.name, await engine.sample(model.name, noise, { onStep, signal }));
      } catch (error) {
        if (!signal.aborted && !(error instanceof Cancelled)) {
          output.textContent = `${title}: not available`;
          canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
        }
        throw error;
      }
    }
    const { pixels, ms } = known.get(model.name);
    paint(canvas, pixels, size, COLUMNS);
    output.textContent = `${title}: ${duration(ms)}`;
  }, report);

  slider.addEventListener("input", () => show());
  show();
}
