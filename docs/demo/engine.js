// The page's side of the worker: questions are promises, and a model is used once it is open.

/** Thrown into a sample that was cancelled; not an error for the reader. */
export class Cancelled extends Error {}

export class Engine {
  /** onProgress: called with (file, number of bytes so far). onCrash: with an Error. */
  constructor(manifest, base, onProgress, onCrash) {
    this.waiting = new Map();
    this.opened = new Map();
    this.next = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => {
      if (data.progress) onProgress(data.progress.file, data.progress.received);
      else this.#answer(data);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      const reason = event.message ? ` (${event.message})` : "";
      this.#crash(new Error(`The page's worker has failed${reason}. Reload the page.`));
      onCrash(this.crashed);
    };
    for (const model of [...manifest.models, manifest.guided]) {
      if (model) this.opened.set(model.name, later());
    }
    this.#ask({ kind: "start", manifest, base: String(base) }).answer.catch(() => {});
  }

  #answer({ id, step, result, error }) {
    const question = this.waiting.get(id);
    if (!question) return;
    if (step) {
      question.onStep?.(step);
      return;
    }
    this.waiting.delete(id);
    if (error) question.reject(new Error(error));
    else question.resolve(result);
  }

  /** Ends all waiting, now and later. */
  #crash(error) {
    this.crashed = error;
    for (const { reject } of [...this.waiting.values(), ...this.opened.values()]) reject(error);
    this.waiting.clear();
  }

  #ask(message, onStep) {
    const id = this.next++;
    const answer = new Promise((resolve, reject) => {
      if (this.crashed) reject(this.crashed);
      else this.waiting.set(id, { resolve, reject, onStep });
    });
    this.worker.postMessage({ id, ...message });
    return { id, answer };
  }

  /** Loads a model. Samples of it wait for that; main.js decides which one is loaded when. */
  async open(name) {
    const { promise, resolve, reject } = this.opened.get(name);
    try {
      await this.#ask({ kind: "open", name }).answer;
      resolve();
    } catch (error) {
      reject(error);
    }
    return promise;
  }

  /** Resolves when the model is open. */
  ready(name) {
    return this.opened.get(name).promise;
  }

  /**
   * Returns a promise of { pixels, ms }: images from this noise, and the network's time for them.
   *
   * options: from, index of the level that z is at; condition, { label, guidance }; onStep, called
   * with { n, z, x } as pixels before the next step; signal, an AbortSignal. Throws Cancelled.
   */
  async sample(name, z, { from, condition, onStep, signal } = {}) {
    await this.ready(name);
    if (signal?.aborted) throw new Cancelled();
    const message = { kind: "sample", name, z, from, condition, trace: Boolean(onStep) };
    const { id, answer } = this.#ask(message, onStep);
    const cancel = () => this.worker.postMessage({ id, kind: "cancel" });
    signal?.addEventListener("abort", cancel, { once: true });
    const result = await answer;
    signal?.removeEventListener("abort", cancel);
    if (result === null || signal?.aborted) throw new Cancelled();
    return result;
  }
}

/** Returns a promise with its own resolve and reject; nobody has to wait for it. */
function later() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  made.promise.catch(() => {});
  return made;
}
