// ONNX Runtime in the worker: starts it once, and opens models as sessions.

import * as ort from "./vendor/ort.wasm.bundle.min.js";
import { downloadChecked } from "./download.js";
import { RUNTIME } from "./runtime-file.js";

let started = null;
let turn = Promise.resolve();

/** Loads the WebAssembly file. onProgress: see download. */
export function startRuntime(onProgress) {
  started ??= start(onProgress);
  return started;
}

async function start(onProgress) {
  const binary = await downloadChecked(RUNTIME, new URL("vendor/", import.meta.url), onProgress);
  // More threads need headers (COOP, COEP) that static hosts do not send.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.logLevel = "error";
}

/** Returns a session of the graph, with these weights (float16; the graph widens them). */
export async function openSession(graph, weights) {
  try {
    return await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData: [{ path: "weights", data: weights }],
      logSeverityLevel: 3,
    });
  } catch (error) {
    throw new Error(`This browser could not start the network: ${error.message ?? error}`);
  }
}

/**
 * Returns { x, eps, ms }: what a model believes of z at a noise level. shape: (B, C, H, W).
 *
 * condition: { label, guidance }, arrays with a number for each image, for a guided model. Calls
 * wait for each other, so that ms is the time of this one alone.
 */
export function predict(session, z, shape, logsnr, condition) {
  const count = shape[0];
  const feeds = {
    z: new ort.Tensor("float32", z, shape),
    logsnr: new ort.Tensor("float32", new Float32Array(count).fill(logsnr), [count]),
  };
  if (condition) {
    feeds.label = new ort.Tensor("int64", BigInt64Array.from(condition.label, BigInt), [count]);
    feeds.guidance = new ort.Tensor("float32", Float32Array.from(condition.guidance), [count]);
  }
  const result = turn.then(async () => {
    const begin = performance.now();
    const { x_hat, eps_hat } = await session.run(feeds);
    return { x: x_hat.data, eps: eps_hat.data, ms: performance.now() - begin };
  });
  turn = result.catch(() => {});
  return result;
}
