"""Samplers: (denoise, z, levels) -> x. Noise levels are data: no sampler knows a schedule.

All take: denoise, (z, logsnr) -> Prediction with its condition bound; z, standard normal noise
(B, C, H, W); levels, logsnr (N + 1,) from t = 1 down, the last one +inf where x_hat itself is to
come out; draw_noise, () -> standard normal noise of z's shape, for those that draw; on_step, called
before each step with (i, z_t, prediction), i = N - 1 .. 0. All return the last z.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.gaussian import Denoise, Prediction, ddim_step, diffuse, posterior
from diffusion.schedule import alpha_sigma

DrawNoise = Callable[[], Tensor]
OnStep = Callable[[int, Tensor, Prediction], None]
Sampler = Callable[..., Tensor]


def _steps(levels: Tensor, batch_size: int) -> list[tuple[int, Tensor, Tensor]]:
    """(i, logsnr_t, logsnr_s) of every step, i = N - 1 .. 0, each level of shape (B,)."""
    rows = levels[:, None].expand(-1, batch_size)
    last = len(levels) - 2
    return [(last - n, rows[n], rows[n + 1]) for n in range(last + 1)]


@torch.no_grad()
def ddim(
    denoise: Denoise,
    z: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n"],
    *,
    draw_noise: DrawNoise | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b ..."]:
    """DDIM, deterministic (Song et al. 2021, eta = 0): what is distilled. Draws no noise."""
    for i, logsnr_t, logsnr_s in _steps(levels, len(z)):
        prediction = denoise(z, logsnr_t)
        if on_step is not None:
            on_step(i, z, prediction)
        z = ddim_step(prediction, logsnr_s)
    return z


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    z: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n"],
    *,
    draw_noise: DrawNoise,
    on_step: OnStep | None = None,
    log_variance_mix: float = 0.0,
) -> Float[Tensor, "b ..."]:
    """Ancestral sampling (Ho et al. 2020): z_s ~ q(z_s | z_t, x_hat); see posterior.

    log_variance_mix: 0 the small variance, 1 the large one, between them log-linear. A last step
    to +inf returns x_hat and draws nothing.
    """
    ends_on_x_hat = bool(torch.isposinf(levels[-1]))
    for i, logsnr_t, logsnr_s in _steps(levels, len(z)):
        prediction = denoise(z, logsnr_t)
        if on_step is not None:
            on_step(i, z, prediction)
        z, variance = posterior(z, prediction.x, logsnr_t, logsnr_s, log_variance_mix)
        if i > 0 or not ends_on_x_hat:
            z = z + variance.sqrt() * draw_noise()
    return z


@torch.no_grad()
def dpm_solver_2m(
    denoise: Denoise,
    z: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n"],
    *,
    draw_noise: DrawNoise | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b ..."]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, deterministic.

    In half-logsnr, h = (logsnr_s - logsnr_t) / 2 and r = h_previous / h:
    D = (1 + 1/(2r)) x_hat - 1/(2r) x_hat_previous, z_s = (sigma_s/sigma_t) z_t +
    alpha_s (1 - e^-h) D. The first and the last step take D = x_hat.
    """
    x_previous = h_previous = None
    for i, logsnr_t, logsnr_s in _steps(levels, len(z)):
        prediction = denoise(z, logsnr_t)
        if on_step is not None:
            on_step(i, z, prediction)
        h = ((logsnr_s - logsnr_t) / 2).reshape(-1, *[1] * (z.ndim - 1)).to(z.dtype)
        d = prediction.x
        if x_previous is not None and h_previous is not None and i > 0:
            d = d + h / (2 * h_previous) * (d - x_previous)
        _, sigma_t = alpha_sigma(logsnr_t, z)
        alpha_s, sigma_s = alpha_sigma(logsnr_s, z)
        z = sigma_s / sigma_t * z - alpha_s * torch.expm1(-h) * d
        x_previous, h_previous = prediction.x, h
    return z


@torch.no_grad()
def consistency(
    denoise: Denoise,
    z: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n"],
    *,
    draw_noise: DrawNoise,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b ..."]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1).

    z_s = alpha_s x_hat + sigma_s eps with fresh noise eps: for networks whose x_hat is a sample at
    every level. A last step to +inf returns x_hat and draws nothing.
    """
    for i, logsnr_t, logsnr_s in _steps(levels, len(z)):
        prediction = denoise(z, logsnr_t)
        if on_step is not None:
            on_step(i, z, prediction)
        ends = bool(torch.isposinf(logsnr_s[0]))
        z = prediction.x if ends else diffuse(prediction.x, draw_noise(), logsnr_s)
    return z


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "ancestral:large": partial(ancestral, log_variance_mix=1.0),
    "dpm_solver++": dpm_solver_2m,
    "consistency": consistency,
}
MEDIUM = "ancestral:medium:"


def make_sampler(name: str) -> Sampler:
    """The sampler of that name: one of SAMPLERS, or ancestral:medium:F with F in [0, 1].

    Raises ValueError that lists the known names.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    try:
        mix = float(name.removeprefix(MEDIUM)) if name.startswith(MEDIUM) else -1.0
    except ValueError:
        mix = -1.0
    if not 0.0 <= mix <= 1.0:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"unknown sampler {name!r}; known: {known}, {MEDIUM}F with F in [0, 1]")
    return partial(ancestral, log_variance_mix=mix)
