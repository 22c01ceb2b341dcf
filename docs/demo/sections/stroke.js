// The reader's stroke, noised to a level of a student's grid and finished by the student (SDEdit,
// Meng et al. 2022).

import { alphaSigma, diffuse, fromPixels, toPixels } from "../diffusion.js";
import { normals } from "../noise.js";
import { paint, plural } from "../picture.js";
import { coalesced } from "../tasks.js";
import { Pen } from "./pen.js";

export function start(section, { engine, manifest, report }) {
  const size = manifest.image_size;
  const students = manifest.models.filter((model) => model.name !== "teacher");
  const model = students[0] ?? manifest.models[0]; // the most steps: the finest choice of levels
  const find = (selector) => section.querySelector(selector);
  const [slider, output] = [find("input"), find("output")];
  let seed = 1;

  let latest; // { n, z }: what the student is to finish

  const finish = coalesced(async () => {
    const { n, z } = latest;
    try {
      const { pixels } = await engine.sample(model.name, z, { from: n });
      paint(find(".clean"), pixels, size);
    } catch (error) {
      output.textContent = "the student is not available";
      throw error;
    }
  }, report);

  function change() {
    const n = slider.valueAsNumber;
    const [alpha, sigma] = alphaSigma(model.levels[n]);
    const left = plural(model.steps - n, "step");
    output.textContent =
      `${alpha.toFixed(2)} × drawing + ${sigma.toFixed(2)} × noise, ${left} to go`;
    slider.setAttribute("aria-valuetext", output.textContent);
    const noise = normals(seed, size ** 2);
    const z = diffuse(fromPixels(pen.pixels()), noise, model.levels[n]);
    paint(find(".noisy"), toPixels(z), size);
    latest = { n, z };
    finish();
  }

  slider.max = model.steps - 1;
  slider.value = Math.min(3, model.steps - 1);
  const pen = new Pen(find(".pen"), size, change);
  slider.addEventListener("input", change);
  find(".clear").addEventListener("click", () => pen.clear());
  find(".example").addEventListener("click", () => pen.example());
  find(".renew").addEventListener("click", () => {
    seed++;
    change();
  });
  pen.example();
}
