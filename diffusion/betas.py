"""Discrete noise schedules: the variances beta_i that the steps i = 0 .. T-1 of a chain add.

abar_i = prod_(j <= i) (1 - beta_j) is alpha^2 after step i (Ho et al. 2020), so that the level is
logsnr_i = log(abar_i / (1 - abar_i)). All in float64.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.grids import Grid

Betas = Float[Tensor, "t"]
LARGEST_BETA = 0.999
NO_SIGNAL = -36.0
"""The logsnr in the place of -inf: alpha is 1.5e-8, nothing beside an image in float32."""


def linear_betas(num_steps: int, first: float, last: float) -> Betas:
    """Equally spaced variances (Ho et al. 2020, section 4)."""
    return torch.linspace(first, last, num_steps, dtype=torch.float64)


def scaled_linear_betas(num_steps: int, first: float, last: float) -> Betas:
    """Equally spaced standard deviations (Rombach et al. 2022)."""
    return linear_betas(num_steps, math.sqrt(first), math.sqrt(last)).square()


def squared_cosine_betas(num_steps: int, first: float, last: float) -> Betas:
    """beta_i = min(1 - f((i + 1) / T) / f(i / T), 0.999), f(t) = cos^2((t + 0.008) / 1.008 pi / 2).

    Nichol & Dhariwal 2021, equations 16 and 17. first and last are not used.
    """
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1.0 - f[1:] / f[:-1]).clamp(max=LARGEST_BETA)


BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": squared_cosine_betas,
}


def grid_of_betas(betas: Betas, zero_terminal: bool = False) -> Grid:
    """The grid of all T levels of a discrete schedule: logsnr_(T-1), .., logsnr_0, +inf.

    zero_terminal: shift and scale sqrt(abar) so that its last value is 0 and its first stays (Lin
    et al. 2024, algorithm 1). A level without any signal has the logsnr NO_SIGNAL. See require_grid
    for levels that are no grid, as those of a beta of 0.
    """
    log_abar = torch.log1p(-betas).cumsum(0)
    if zero_terminal:
        root = (log_abar / 2).exp()
        log_abar = 2 * torch.log((root - root[-1]) * root[0] / (root[0] - root[-1]))
    logsnr = log_abar - torch.log(-torch.expm1(log_abar))
    levels = logsnr.clamp(min=NO_SIGNAL).flip(0)
    return torch.cat([levels, torch.tensor([torch.inf], dtype=torch.float64)])
