// Wires the page: loads the manifest, opens the models one after the other, starts the sections.
//
// For tests and for the console there is window.demo:
//
//   demo.models                        names of the models, most steps first
//   demo.loaded                        a promise that resolves when all of them are open
//   demo.draw(name, noise, steps, condition)
//
// draw returns a promise of the pixels, a Uint8Array, that a model makes of standard normal noise,
// a Float32Array of one or several images (B, 1, 32, 32). steps must be the model's own number.
// condition, for the model "guided": { label: [..], guidance: [..] }, a number for each image.

import { downloadJson, parcel } from "./download.js";
import { Engine } from "./engine.js";
import { RUNTIME } from "./runtime-file.js";
import { Status } from "./status.js";
import * as compare from "./sections/compare.js";
import * as guided from "./sections/guided.js";
import * as steps from "./sections/steps.js";
import * as stroke from "./sections/stroke.js";
import * as trajectory from "./sections/trajectory.js";
import * as walk from "./sections/walk.js";

const FORMAT = "progressive-distillation demo";
const SECTIONS = { compare, steps, walk, trajectory, stroke, guided };

const status = new Status();
const report = (error) => status.fail(error);

async function readManifest(base) {
  const manifest = await downloadJson(new URL("manifest.json", base));
  if (manifest.format !== FORMAT || manifest.format_version !== 1 || !manifest.models?.length) {
    throw new Error("manifest.json is not one that this page reads: python -m tools.export_demo.");
  }
  return manifest;
}

/** Returns all models in the order to load them in: the first picture needs the one of 1 step. */
function inOrder(manifest) {
  return [...manifest.models].reverse().concat(manifest.guided ?? []);
}

function announce(manifest) {
  const files = inOrder(manifest).flatMap(({ weights, graph }) => [weights, graph ?? []].flat());
  for (const { name, size } of [...files, manifest.graph, RUNTIME].map(parcel)) {
    status.expect(name, size);
  }
}

async function openAll(engine, manifest) {
  let whole = true;
  for (const model of inOrder(manifest)) {
    try {
      await engine.open(model.name);
    } catch (error) {
      whole = false; // the other models still work
      report(error);
    }
  }
  status.complete(whole);
}

function hook(engine, manifest, loaded) {
  const known = inOrder(manifest);
  async function draw(name, noise, count, condition) {
    const model = known.find((entry) => entry.name === name);
    if (!model) throw new Error(`no model ${name}; there are ${known.map((m) => m.name)}`);
    if (count !== undefined && count !== model.steps) {
      throw new Error(`${name} draws in ${model.steps} steps, not ${count}`);
    }
    const { pixels } = await engine.sample(name, noise, { condition });
    return new Uint8Array(pixels);
  }
  return { models: manifest.models.map((model) => model.name), loaded, draw };
}

function requireWebAssembly() {
  if (typeof WebAssembly === "object") return;
  throw new Error(
    "This browser does not run WebAssembly, which this page needs. Enable it, or use " +
      "a current version of Chrome, Edge, Firefox or Safari.",
  );
}

async function main() {
  requireWebAssembly();
  const base = new URL("models/", import.meta.url);
  const manifest = await readManifest(base);
  announce(manifest);
  const engine = new Engine(
    manifest,
    base,
    (file, received) => status.progress(file, received),
    report,
  );
  const loaded = openAll(engine, manifest);
  window.demo = hook(engine, manifest, loaded);
  for (const [id, section] of Object.entries(SECTIONS)) {
    section.start(document.getElementById(id), { engine, manifest, report });
  }
}

main().catch(report);
