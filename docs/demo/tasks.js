// Ways to run work that the reader starts faster than it ends.

import { Cancelled } from "./engine.js";

/** Returns a function that cancels the call before it: the newest one counts. */
export function newest(work, report) {
  let controller = null;
  return async (...given) => {
    controller?.abort();
    controller = new AbortController();
    try {
      await work(controller.signal, ...given);
    } catch (error) {
      if (!(error instanceof Cancelled)) report(error);
    }
  };
}

/** Returns a function that lets a call end, then repeats it once if there were others meanwhile. */
export function coalesced(work, report) {
  let running = false;
  let again = false;
  return async () => {
    again = true;
    if (running) return;
    running = true;
    try {
      while (again) {
        again = false;
        await work();
      }
    } catch (error) {
      report(error);
    } finally {
      running = false;
    }
  };
}
