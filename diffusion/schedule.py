"""Noise schedules: time t in [0, 1] (0 data, 1 noise) -> logsnr, and noise levels as data."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]
"""t in [0, 1], any shape, float64 -> logsnr of the same shape, float64."""


def cosine_logsnr(
    t: Float[Tensor, "*shape"], logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Float[Tensor, "*shape"]:
    """The cosine schedule in closed form, with its range inside the schedule.

    logsnr(t) = -2 log tan(a t + b), b = atan(e^(-logsnr_max/2)), a = atan(e^(-logsnr_min/2)) - b
    (Salimans & Ho 2022, appendix; Nichol & Dhariwal 2021 without the range).

    t: times in [0, 1]; t = 0 gives logsnr_max, t = 1 gives logsnr_min. Pass float64: float32
    alone is off by 1e-3 at t = 1. Returns natural-log signal-to-noise ratios, shaped as t.
    """
    b = math.atan(math.exp(-logsnr_max / 2))
    a = math.atan(math.exp(-logsnr_min / 2)) - b
    return -2.0 * torch.log(torch.tan(a * t + b))


SCHEDULES: dict[str, Callable[..., Tensor]] = {"cosine": cosine_logsnr}


def make_schedule(name: str, logsnr_min: float, logsnr_max: float) -> Schedule:
    """The schedule of that name with its range bound: a function t -> logsnr.

    Raises KeyError for a name that is not in SCHEDULES.
    """
    return partial(SCHEDULES[name], logsnr_min=logsnr_min, logsnr_max=logsnr_max)


def alpha_sigma(
    logsnr: Float[Tensor, "b"], images: Float[Tensor, "b ..."]
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """alpha and sigma of a variance-preserving process, broadcastable to the images.

    alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr) (Kingma et al. 2021). At logsnr = +inf
    they are 1 and 0 exactly. Computed in the precision of logsnr, returned in that of the images.
    """
    logsnr = logsnr.reshape(-1, *[1] * (images.ndim - 1))
    alpha = torch.sigmoid(logsnr).sqrt()
    sigma = torch.sigmoid(-logsnr).sqrt()
    return alpha.to(images.dtype), sigma.to(images.dtype)


def sampling_levels(schedule: Schedule, num_steps: int) -> Float[Tensor, "{num_steps}+1"]:
    """The noise levels of a sampling grid: t = 1, 1 - 1/N, .., 1/N, and +inf in the place of t = 0.

    The last level is +inf (alpha 1, sigma 0) because a sampler ends on x_hat itself (Salimans &
    Ho 2022, section 2), so that no step needs a rule for the end. float64, on the CPU.
    """
    t = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    return torch.cat([schedule(t), torch.tensor([torch.inf], dtype=torch.float64)])


def transition_levels(
    schedule: Schedule, num_steps: int, i: Int[Tensor, "b"], k: int
) -> Float[Tensor, "{k}+1 b"]:
    """The levels of a student's step i, with the k - 1 levels its teacher visits on the way.

    Student step i of N = num_steps goes from t = (i + 1)/N to s = i/N (Salimans & Ho 2022,
    algorithm 2). They are k + 1 neighbours of the sampling grid of the teacher, who has k N steps.

    i: step indices in 0 .. N-1, one per example; 0 is the last step, which ends at +inf.
    Returns logsnr from t down to s, float64, on the device of i.
    """
    grid = sampling_levels(schedule, k * num_steps).to(i.device)
    first = k * (num_steps - 1 - i)
    return grid[first + torch.arange(k + 1, device=i.device)[:, None]]
