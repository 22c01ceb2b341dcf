// Files, loaded with progress and checked. Every error is a sentence for the reader of the page.

const ADVICE = "Reload the page; if that does not help, the site's copy of it is incomplete.";

/** Returns the bytes of a file as they are. onProgress: called with the number of bytes so far. */
async function download(url, onProgress = () => {}, options = {}) {
  const name = nameOf(url);
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error(`${name} could not be loaded: the server did not answer. ${ADVICE}`);
  }
  if (!response.ok) {
    throw new Error(`${name} could not be loaded: the server says ${response.status}. ${ADVICE}`);
  }
  const parts = [];
  let received = 0;
  try {
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      received += part.value.length;
      onProgress(received);
    }
  } catch {
    throw new Error(`${name} could not be loaded: the connection was lost. ${ADVICE}`);
  }
  const bytes = new Uint8Array(received);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}

/** Throws unless the bytes are those of the file: { file, bytes, sha256 }. */
async function verify(bytes, { file, bytes: expected, sha256 }) {
  if (bytes.length !== expected) {
    const [has, should] = [bytes.length, expected].map((n) => n.toLocaleString("en"));
    throw new Error(`${file} is damaged: it has ${has} bytes instead of ${should}. ${ADVICE}`);
  }
  // Only pages from https or localhost have it; the length must do for the others.
  if (!globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== sha256) {
    throw new Error(`${file} is damaged: its content is not what was published. ${ADVICE}`);
  }
}

/** The name and the size of what is loaded for a file, which may be packed by gzip. */
export function parcel({ packed, packedBytes, file, bytes }) {
  return packed ? { name: packed, size: packedBytes } : { name: file, size: bytes };
}

/** Returns the content of a file. The query keeps old copies in caches out of the way. */
export async function downloadChecked(entry, base, onProgress) {
  const { name } = parcel(entry);
  const url = new URL(name, base);
  url.searchParams.set("v", entry.sha256.slice(0, 8));
  const loaded = await download(url, onProgress);
  const bytes = entry.packed ? await gunzip(loaded, name) : loaded;
  await verify(bytes, entry);
  return bytes;
}

/** Returns the JSON in a file, never an old one: it says which other files are wanted. */
export async function downloadJson(url) {
  const bytes = await download(url, undefined, { cache: "no-cache" });
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new Error(`${nameOf(url)} is damaged: it is not JSON. ${ADVICE}`);
  }
}

/** Returns the bytes without gzip, which some servers have already undone. */
async function gunzip(bytes, name) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack gzip. Use a current version of any browser.");
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error(`${name} is damaged: it cannot be unpacked. ${ADVICE}`);
  }
}

function nameOf(url) {
  return new URL(url).pathname.split("/").pop();
}
