"""The Frechet distance: of one model, of two in comparison, and of infinitely many samples.

Images of two models that start from the same noise vary together. The difference of their distances
is therefore known far better than either distance.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

SETS = 10  # equal sets of the noise, each of which is left out once
STUDENT_T = 2.262  # 97.5% quantile with nine degrees of freedom
PARTS = 4  # the limit is fitted to distances of all samples, and of halves, thirds and quarters
SAMPLES_PER_FEATURE = 2  # below that a distance of a quarter is no longer linear in 1 / n


class Interval(NamedTuple):
    """A value, and half the width of its 95% interval."""

    value: float
    half: float


class Compared(NamedTuple):
    """The difference of two distances, and their ratio."""

    difference: Interval
    ratio: Interval


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Returns |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017)."""
    return _distance(a, fid_features_to_statistics(b.double()))


def _distance(samples: Tensor, real: dict[str, Any]) -> float:
    """The distance from real images of which only mean and covariance are known."""
    own = fid_features_to_statistics(samples.double())
    distance = fid_statistics_to_metric(own, real, False)["frechet_inception_distance"]
    return max(0.0, float(distance))  # rounding can make it negative


def distances_without(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> list[float]:
    """Returns the Frechet distances without each of ten equal sets of the samples."""
    sets = samples[: len(samples) - len(samples) % SETS].chunk(SETS)
    known = fid_features_to_statistics(real.double())
    return [_distance(torch.cat([*sets[:n], *sets[n + 1 :]]), known) for n in range(len(sets))]


def compare_distances(
    distance: float, without: Sequence[float], other: float, other_without: Sequence[float]
) -> Compared:
    """Compares two distances over the same noise, each with its distances_without."""
    pairs = list(zip(without, other_without, strict=True))
    return Compared(
        jackknife(distance - other, [a - b for a, b in pairs]),
        jackknife(distance / max(other, 1e-9), [a / max(b, 1e-9) for a, b in pairs]),
    )


def jackknife(value: float, without: Sequence[float]) -> Interval:
    """Returns a value with the 95% interval of its values without each of equal sets.

    se^2 = (k - 1)/k sum_n (v_n - mean)^2 for k sets, where v_n is the value without set n (Efron
    1982).
    """
    count = len(without)
    error = (count - 1) / count**0.5 * statistics.stdev(without)
    return Interval(value, STUDENT_T * error)


def limit_distance(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float | None:
    """Returns the Frechet distance that infinitely many samples would have.

    The bias of a distance is linear in 1/n (Chong & Forsyth 2020): a line through the mean
    distances of disjoint parts of n, n/2, n/3 and n/4 samples, at 1/n = 0. None if the samples are
    too few for their features.
    """
    count, features = samples.shape
    if count < PARTS * SAMPLES_PER_FEATURE * features:
        return None
    inverse, distances = [], []
    known = fid_features_to_statistics(real.double())
    for parts in range(1, PARTS + 1):
        size = count // parts
        sets = samples[: size * parts].split(size)
        inverse.append(1.0 / size)
        distances.append(statistics.fmean(_distance(part, known) for part in sets))
    return statistics.linear_regression(inverse, distances).intercept
