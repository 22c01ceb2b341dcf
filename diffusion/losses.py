"""Losses: one value per example. A loss compares a prediction with its target."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion.gaussian import Prediction, velocity
from diffusion.random_features import feature_maps, feature_vectors


class Example(NamedTuple):
    """A batch of what a loss compares, each of its tensors with a row for each image.

    prediction: the network's, of z at the noise level logsnr. target: what it should be. x: the
    image that z was made of. end: the logsnr at which a student's step ends, (B,); where it is
    +inf, x_hat should look like an image of the data set.
    """

    prediction: Prediction
    target: Prediction
    x: Tensor
    logsnr: Tensor
    end: Float[Tensor, "b"]


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


CAP = 25.0  # of the weight; 1 / sigma^2 reaches it at sigma = 0.2


def snr_capped(example: Example) -> Float[Tensor, "b"]:
    """min(1 + SNR, CAP) mse_x = mse_v, but with a bounded weight where there is little noise.

    As Hang et al. 2023 bound the SNR ("Min-SNR"). The 1 keeps a weight at t = 1.
    """
    weight = (1 + example.logsnr.exp()).clamp(max=CAP)
    return weight.to(example.x.dtype) * constant(example)


SQUARED_ERRORS: dict[str, Loss] = {
    "constant": constant,
    "snr": snr,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
    "snr_capped": snr_capped,
}


HUBER = 0.00054  # c over the root of the number of dimensions (Song & Dhariwal 2023, section 3.3)


def pseudo_huber(example: Example) -> Float[Tensor, "b"]:
    """sqrt(s + c^2) - c of s = snr_trunc (Song & Dhariwal 2023, section 3.3, where s = mse_x).

    Almost the root: an image that the student cannot draw well pulls no harder than the others.
    """
    return (snr_trunc(example) + HUBER**2).sqrt() - HUBER


def perceptual(example: Example) -> Float[Tensor, "b"]:
    """The distance of x_hat to its target in random features, as LPIPS measures it in trained ones.

    Zhang et al. 2018, equation 1, without learnt weights: at each pixel of each feature map the
    vectors of channels are brought to length 1, and their squared differences are averaged.
    """
    pairs = zip(feature_maps(example.prediction.x), feature_maps(example.target.x), strict=True)
    distances = [
        mean_square(F.normalize(a, dim=1) - F.normalize(b, dim=1)) * a.shape[1]
        for maps in pairs
        for a, b in zip(*maps, strict=True)
    ]
    return torch.stack(distances).mean(0)


def energy(example: Example) -> Float[Tensor, "b"]:
    """The energy distance between the samples x_hat and real images, in random features.

    2 E|f - r| - E|f - f'| - E|r - r'| over all pairs of different images of the batch, f of x_hat
    and r of x (Szekely & Rizzo 2013), the mean over several networks; its mean over the samples is
    unbiased. It pulls towards the data, not towards the teacher. Examples that are no samples,
    whose Example.end is finite, have a loss of 0; so has a batch with fewer than two samples.
    """
    samples = torch.isposinf(example.end).to(example.x.dtype)
    others = 1 - torch.eye(len(samples), dtype=samples.dtype, device=samples.device)
    count = samples.sum()
    total = torch.zeros_like(samples)
    fakes, reals = feature_vectors(example.prediction.x), feature_vectors(example.x)
    for f, r in zip(fakes, reals, strict=True):
        to_real = (_distances(f, r) * others).sum(1) / max(len(f) - 1, 1)
        to_samples = (_distances(f, f) * others) @ samples / (count - 1).clamp(min=1)
        among_real = (_distances(r, r) * others).sum() / max(len(r) * (len(r) - 1), 1)
        total = total + 2 * to_real - to_samples - among_real
    return total / len(fakes) * samples * (count >= 2)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


LOSSES: dict[str, Loss] = {
    **SQUARED_ERRORS,
    "pseudo_huber": pseudo_huber,
    "perceptual": perceptual,
    "energy": energy,
}
ADVERSARIAL = "adversarial"  # the name of a term that is trained itself: diffusion/adversarial.py


def weighted_sum(weights: Mapping[str, float]) -> Loss:
    """The loss that sums entries of LOSSES with these weights. Raises KeyError for other names."""
    terms = [(LOSSES[name], weight) for name, weight in weights.items()]

    def loss(example: Example) -> Tensor:
        return torch.stack([weight * term(example) for term, weight in terms]).sum(0)

    return loss
