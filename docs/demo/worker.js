// The worker: all computing happens here, so that the page never freezes.
//
// In: { id, kind: "start" | "open" | "sample" | "cancel", .. }, see engine.js. Out: { id, result },
// { id, error } with a sentence, { id, step }, and { progress: { file, received } }.

import { ddim, toPixels } from "./diffusion.js";
import { downloadChecked, parcel } from "./download.js";
import { openSession, predict, startRuntime } from "./runtime.js";
import { RUNTIME } from "./runtime-file.js";

let manifest, base;
const files = new Map(); // name -> promise of its bytes, for graphs
const sessions = new Map(); // name of a model -> promise of its session
const cancelled = new Set(); // ids of samples that nobody waits for any more

const progressOf = (entry) => (received) =>
  postMessage({ progress: { file: parcel(entry).name, received } });

/** Returns the entry of a model in the manifest. */
function modelOf(name) {
  const known = [...manifest.models, ...(manifest.guided ? [manifest.guided] : [])];
  const model = known.find((entry) => entry.name === name);
  if (!model) throw new Error(`There is no model ${name}.`);
  return model;
}

function graphOf(model) {
  const entry = model.graph ?? manifest.graph;
  if (!files.has(entry.file)) {
    files.set(entry.file, downloadChecked(entry, base, progressOf(entry)));
  }
  return files.get(entry.file);
}

async function load(model) {
  // All at a time: the first picture waits for the slowest of the three.
  const [, graph, weights] = await Promise.all([
    startRuntime(progressOf(RUNTIME)),
    graphOf(model),
    downloadChecked(model.weights, base, progressOf(model.weights)),
  ]);
  return openSession(graph, weights);
}

function open(name) {
  if (!sessions.has(name)) sessions.set(name, load(modelOf(name)));
  return sessions.get(name);
}

// Lets other messages in between two steps. A timer would wait for 4 ms each time.
const channel = new MessageChannel();
const waiting = [];
channel.port1.onmessage = () => waiting.shift()();
function breathe() {
  return new Promise((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(null);
  });
}

async function sample({ id, name, z, from = 0, condition, trace }) {
  const session = await open(name);
  const model = modelOf(name);
  const levels = [...model.levels, Infinity].slice(from);
  const size = manifest.image_size;
  const shape = [z.length / size ** 2, 1, size, size];
  let ms = 0;
  const timed = async (noisy, logsnr) => {
    const prediction = await predict(session, noisy, shape, logsnr, condition);
    ms += prediction.ms;
    return prediction;
  };
  let last = z;
  for await (const step of ddim(timed, z, levels, model.clip)) {
    last = step.next;
    if (trace) {
      const pixels = { z: toPixels(step.z), x: toPixels(step.x) };
      postMessage({ id, step: { n: from + step.n, ...pixels } });
    }
    await breathe();
    if (cancelled.delete(id)) return null;
  }
  return { pixels: toPixels(last), ms };
}

const KINDS = {
  start(message) {
    ({ manifest, base } = message);
    return null;
  },
  async open({ name }) {
    await open(name);
    return null;
  },
  sample,
};

self.onmessage = async ({ data }) => {
  if (data.kind === "cancel") {
    cancelled.add(data.id);
    return;
  }
  try {
    postMessage({ id: data.id, result: await KINDS[data.kind](data) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message ?? String(error) });
  } finally {
    cancelled.delete(data.id);
  }
};
