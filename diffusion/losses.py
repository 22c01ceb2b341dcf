"""Losses: one value per example. A loss compares a prediction with its target."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion.gaussian import Prediction, velocity


class Example(NamedTuple):
    """A batch of what a loss compares, each of its tensors with a row for each image.

    prediction: the network's, of z at the noise level logsnr. target: what it should be. x: the
    image that z was made of. is_sample: whether x_hat should look like an image of the data set
    (B,), as where a student's step ends at logsnr = +inf.
    """

    prediction: Prediction
    target: Prediction
    x: Tensor
    logsnr: Tensor
    is_sample: Bool[Tensor, "b"]


Loss = Callable[[Example], Tensor]
"""Example -> loss per example, (B,)."""


def mean_square(difference: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
    """The mean square over everything but the first axis."""
    return difference.square().flatten(1).mean(1)


def constant(example: Example) -> Float[Tensor, "b"]:
    """mse_x = ||x_hat - x||^2: the same weight at every noise level."""
    return mean_square(example.prediction.x - example.target.x)


def snr(example: Example) -> Float[Tensor, "b"]:
    """SNR mse_x = mse_eps (Ho et al. 2020). It vanishes at t = 1: not for few-step students."""
    return mean_square(example.prediction.eps - example.target.eps)


def snr_trunc(example: Example) -> Float[Tensor, "b"]:
    """max(1, SNR) mse_x = max(mse_x, mse_eps) (Salimans & Ho 2022, section 4)."""
    return torch.maximum(constant(example), snr(example))


def snr_plus_one(example: Example) -> Float[Tensor, "b"]:
    """(1 + SNR) mse_x = mse_v (Salimans & Ho 2022, section 4)."""
    v_hat, v = (velocity(p, example.logsnr) for p in (example.prediction, example.target))
    return mean_square(v_hat - v)


LOSSES: dict[str, Loss] = {
    "constant": constant,
    "snr": snr,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
}


def weighted_sum(weights: Mapping[str, float]) -> Loss:
    """The loss that sums entries of LOSSES with these weights. Raises KeyError for other names."""
    terms = [(LOSSES[name], weight) for name, weight in weights.items()]

    def loss(example: Example) -> Tensor:
        return torch.stack([weight * term(example) for term, weight in terms]).sum(0)

    return loss
