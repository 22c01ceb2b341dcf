// Ten digits by a student that takes class and guidance weight as inputs. Hidden without one.

import { Cancelled } from "../engine.js";
import { normals } from "../noise.js";
import { duration, paint } from "../picture.js";
import { newest } from "../tasks.js";

const COLUMNS = 5;

export function start(section, { engine, manifest, report }) {
  const model = manifest.guided;
  section.hidden = !model;
  if (!model) return;
  const size = manifest.image_size;
  const [slider, weight, button, canvas, output] =
    ["input", "output", "button", "canvas", ".time"].map((name) => section.querySelector(name));
  [slider.min, slider.max] = model.guidance;
  slider.value = Math.min(model.guidance[1], Math.max(model.guidance[0], 1));
  let seed = 1;

  const draw = newest(async (signal) => {
    const guidance = slider.valueAsNumber;
    weight.textContent = guidance.toFixed(1);
    const label = Array.from({ length: model.classes }, (_, k) => k);
    const condition = { label, guidance: label.map(() => guidance) };
    const noise = normals(seed, model.classes * size ** 2);
    try {
      const drawn = await engine.sample(model.name, noise, { condition, signal });
      paint(canvas, drawn.pixels, size, COLUMNS);
      output.textContent = duration(drawn.ms);
    } catch (error) {
      if (!(error instanceof Cancelled)) output.textContent = "not available";
      throw error;
    }
  }, report);

  slider.addEventListener("input", () => draw());
  button.addEventListener("click", () => {
    seed++;
    draw();
  });
  draw();
}
