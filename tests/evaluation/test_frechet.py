"""Distances in comparison, and in the limit of infinitely many samples."""

import pytest
import torch

from evaluation.frechet import (
    compare_distances,
    distances_without,
    frechet_distance,
    limit_distance,
)
from evaluation.quality import background
from tests.evaluation.test_quality import features


def test_a_distance_without_a_set_is_that_of_the_others():
    samples, real = features(count=203, seed=1), features(seed=2)
    without = distances_without(samples, real)
    assert len(without) == 10
    others = torch.cat([samples[:40], samples[60:200]])
    assert without[2] == pytest.approx(frechet_distance(others, real))


def test_the_jackknife_of_means_is_their_standard_error():
    """Of a mean the jackknife is exact: Student's t times s / sqrt(10)."""
    rng = torch.Generator().manual_seed(0)
    values, others = torch.randn(2, 10, generator=rng, dtype=torch.float64) + 5
    ours, theirs = ((v.sum() - v) / 9 for v in (values, others))
    compared = compare_distances(
        values.mean().item(), ours.tolist(), others.mean().item(), theirs.tolist()
    )
    difference = values - others
    assert compared.difference.value == pytest.approx(difference.mean().item())
    assert compared.difference.half == pytest.approx(2.262 * difference.std().item() / 10**0.5)
    ratio = (values.mean() / others.mean()).item()
    assert compared.ratio.value == pytest.approx(ratio)
    # the delta method, of which the jackknife of a ratio is an estimate
    spread = (values - ratio * others).std().item() / others.mean().item() / 10**0.5
    assert compared.ratio.half == pytest.approx(2.262 * spread, rel=0.1)


def test_the_same_noise_makes_a_difference_surer():
    """A second model whose features are the first one's, a little further away."""
    real = features(count=4000, seed=1)
    samples = features(count=1000, seed=2, shift=0.3)
    paired = samples * 1.05
    fresh = features(count=1000, seed=3, shift=0.3) * 1.05

    def half(others):
        sides = [(frechet_distance(x, real), distances_without(x, real)) for x in (others, samples)]
        return compare_distances(*sides[0], *sides[1]).difference.half

    assert half(paired) < 0.6 * half(fresh)


def test_the_limit_is_without_the_bias_of_few_samples():
    """Samples of the real distribution itself, whose distance would be 0 for infinitely many."""
    real = features(count=20_000, seed=1)
    biased, limits = [], []
    for seed in range(10, 16):
        samples = features(count=400, seed=seed)
        biased.append(frechet_distance(samples, real))
        limits.append(limit_distance(samples, real))
    bias, left = sum(biased) / 6, abs(sum(limits)) / 6
    assert left < 0.25 * bias
    assert limit_distance(features(count=63), real) is None, "too few for 8 features"
    assert limit_distance(features(count=64), real) is not None


def test_the_background_is_faint_pixels_and_the_edge():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert background(images) == (0.0, 0.0)
    images[0, 0, 0, 0] = 30
    images[1, 0, 3, 3] = 31
    faint, border = background(images)
    assert faint == pytest.approx(1 / 128)
    assert border == pytest.approx(30 / (2 * (64 - 16)))
