"""Losses: one value per example, the mean over its pixels."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.gaussian import Denoise, Prediction, diffuse, velocity

LossWeight = Callable[[Prediction, Prediction, Tensor], Tensor]
"""(prediction, target, logsnr) -> loss per example, (B,)."""


def mean_square(difference: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
    """The mean square over everything but the first axis."""
    return difference.square().flatten(1).mean(1)


def constant(
    prediction: Prediction, target: Prediction, logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """mse_x = ||x_hat - x||^2: the same weight at every noise level."""
    return mean_square(prediction.x - target.x)


def snr(
    prediction: Prediction, target: Prediction, logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """SNR mse_x = mse_eps (Ho et al. 2020). It vanishes at t = 1: not for few-step students."""
    return mean_square(prediction.eps - target.eps)


def snr_trunc(
    prediction: Prediction, target: Prediction, logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """max(1, SNR) mse_x = max(mse_x, mse_eps) (Salimans & Ho 2022, section 4)."""
    return torch.maximum(
        mean_square(prediction.x - target.x), mean_square(prediction.eps - target.eps)
    )


def snr_plus_one(
    prediction: Prediction, target: Prediction, logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """(1 + SNR) mse_x = mse_v (Salimans & Ho 2022, section 4)."""
    return mean_square(velocity(prediction, logsnr) - velocity(target, logsnr))


LOSS_WEIGHTS: dict[str, LossWeight] = {
    "constant": constant,
    "snr": snr,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
}


def denoising_loss(
    denoise: Denoise,
    x: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    logsnr: Float[Tensor, "b"],
    weight: LossWeight,
) -> Float[Tensor, "b"]:
    """The loss of predicting x and eps from z_t = alpha x + sigma eps, per example.

    Salimans & Ho 2022, section 2 and algorithm 1, in continuous time where logsnr is that of
    t ~ U(0, 1). x: images in the model's range; eps: standard normal noise; weight: an entry of
    LOSS_WEIGHTS.
    """
    prediction = denoise(diffuse(x, eps, logsnr), logsnr)
    return weight(prediction, Prediction(x, eps), logsnr)
