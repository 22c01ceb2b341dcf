// A walk through the space of noises, drawn in one step for each frame of the display.

import { normals, slerp } from "../noise.js";
import { paint } from "../picture.js";

const LEG = 2000; // ms from one noise to the next
const IN_FLIGHT = 2; // so that the worker never waits for the page
const WINDOW = 1000; // ms over which digits are counted

export function start(section, { engine, manifest, report }) {
  const size = manifest.image_size;
  const model = manifest.models.at(-1);
  const [button, canvas, output] =
    ["button", "canvas", "output"].map((name) => section.querySelector(name));
  let walking = false;
  let position = 0; // in legs
  let before = null; // time of the latest frame
  let asked = 0;
  let finished = []; // times at which the latest digits were painted
  let ends = [normals(1000, size ** 2), normals(1001, size ** 2)];
  let leg = 0;

  function noiseAt(where) {
    const wanted = Math.floor(where);
    if (wanted !== leg) {
      ends = [0, 1].map((k) => normals(1000 + wanted + k, size ** 2));
      leg = wanted;
    }
    return slerp(...ends, where - wanted);
  }

  async function ask() {
    asked++;
    try {
      const { pixels } = await engine.sample(model.name, noiseAt(position));
      paint(canvas, pixels, size);
      const now = performance.now();
      finished = [...finished.filter((time) => now - time < WINDOW), now];
    } catch (error) {
      stop();
      output.textContent = "not available";
      report(error);
    }
    asked--;
  }

  function frame(time) {
    if (!walking) return;
    // A hidden page gets no frames: no leap when it is shown again.
    if (before !== null) position += Math.min(time - before, 100) / LEG;
    before = time;
    if (asked < IN_FLIGHT) ask();
    if (finished.length > 1) {
      const rate = (1000 * (finished.length - 1)) / (finished.at(-1) - finished[0]);
      output.textContent = `${Math.round(rate)} digits a second`;
    }
    requestAnimationFrame(frame);
  }

  function stop() {
    walking = false;
    button.textContent = "Start";
  }

  button.addEventListener("click", () => {
    if (walking) {
      stop();
      return;
    }
    walking = true;
    [before, finished] = [null, []];
    button.textContent = "Stop";
    requestAnimationFrame(frame);
  });
  // One picture from the beginning; the walk itself starts on demand, as it keeps a core busy.
  ask();
}
