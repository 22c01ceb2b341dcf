"""Noise schedules: time t in [0, 1] (0 data, 1 noise) -> logsnr; alpha and sigma of a logsnr."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
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


NO_FLOAT64 = ("mps",)  # types of devices


def level_dtype(device: torch.device) -> torch.dtype:
    """The precision of noise levels on a device: float64, or float32 where there is no other."""
    missing = device.type in NO_FLOAT64
    if device.type == "xpu":  # some of Intel's GPUs have none
        missing = not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if missing else torch.float64


def on_device(levels: Float[Tensor, "*shape"], device: torch.device) -> Float[Tensor, "*shape"]:
    """Noise levels on the device and in its precision."""
    return levels.to(level_dtype(device)).to(device)


def levels_at(schedule: Schedule, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """The schedule's noise levels at times on a device.

    Computed in float64, on the CPU if the device has none: see cosine_logsnr.
    """
    if level_dtype(t.device) == torch.float64:
        return schedule(t)
    return on_device(schedule(t.cpu().double()), t.device)


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
