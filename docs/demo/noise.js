// Normal noise as a function of a seed, and ways between two noises.

/** Returns a generator of numbers in [0, 1): mulberry32, 32 bits of state. */
export function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Returns `count` standard normal numbers (Box & Muller 1958), a function of the seed alone. */
export function normals(seed, count) {
  const uniform = uniforms(seed);
  const noise = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())); // 1 - u is never 0
    const angle = 2 * Math.PI * uniform();
    noise[i] = radius * Math.cos(angle);
    if (i + 1 < count) noise[i + 1] = radius * Math.sin(angle);
  }
  return noise;
}

/**
 * Returns the point at share t of the arc from a to b (Shoemake 1985):
 * sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, where w is the angle between them.
 *
 * On a straight line between two noises the variance falls to a half in the middle, and a network
 * that has only seen variance 1 draws blurs there.
 */
export function slerp(a, b, t) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  const w = Math.acos(Math.min(1, Math.max(-1, ab / Math.sqrt(aa * bb))));
  // The angle between two noises of many pixels is close to 90 degrees: sin(w) is not near 0.
  const ofA = w ? Math.sin((1 - t) * w) / Math.sin(w) : 1 - t;
  const ofB = w ? Math.sin(t * w) / Math.sin(w) : t;
  return a.map((value, i) => ofA * value + ofB * b[i]);
}
