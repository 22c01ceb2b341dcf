// The formulas of diffusion/gaussian.py and of the DDIM sampler in diffusion/samplers.py.
//
// Coefficients are computed in float64, images are Float32Array. A noise level is a logsnr.

/** alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr) (Kingma et al. 2021); 1, 0 at infinity. */
export function alphaSigma(logsnr) {
  return [Math.sqrt(1 / (1 + Math.exp(-logsnr))), Math.sqrt(1 / (1 + Math.exp(logsnr)))];
}

/** z = alpha x + sigma eps (Salimans & Ho 2022, section 2). With a prediction: the DDIM step. */
export function diffuse(x, eps, logsnr) {
  const [alpha, sigma] = alphaSigma(logsnr);
  return x.map((value, i) => alpha * value + sigma * eps[i]);
}

/** Clips x_hat to [-1, 1] and recomputes eps_hat = (z - alpha x_hat) / sigma from it. */
export function clipped(z, x, logsnr) {
  const [alpha, sigma] = alphaSigma(logsnr);
  const kept = x.map((value) => Math.min(1, Math.max(-1, value)));
  return { x: kept, eps: z.map((value, i) => (value - alpha * kept[i]) / sigma) };
}

/**
 * DDIM (Song et al. 2021, eta = 0): yields { n, z, x, next } for each step, z at levels[n].
 *
 * predict: (z, logsnr) -> promise of { x, eps }. levels: from noise down; at the last one,
 * infinity, next is x_hat itself.
 */
export async function* ddim(predict, z, levels, clip) {
  for (let n = 0; n + 1 < levels.length; n++) {
    let { x, eps } = await predict(z, levels[n]);
    if (clip) ({ x, eps } = clipped(z, x, levels[n]));
    const next = diffuse(x, eps, levels[n + 1]);
    yield { n, z, x, next };
    z = next;
  }
}

/** [-1, 1] -> 0 .. 255; the array type clips and rounds halves to even, as torch does. */
export function toPixels(x) {
  return Uint8ClampedArray.from(x, (value) => (value + 1) * 127.5);
}

/** 0 .. 255 -> [-1, 1]. */
export function fromPixels(pixels) {
  return Float32Array.from(pixels, (value) => value / 127.5 - 1);
}
