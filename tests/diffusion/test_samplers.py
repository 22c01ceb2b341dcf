import math
from itertools import pairwise

import pytest
import torch

from diffusion.gaussian import Prediction, eps_from_x
from diffusion.grids import uniform_grid
from diffusion.samplers import (
    SAMPLERS,
    ancestral,
    consistency,
    ddim,
    dpm_solver_2m,
    make_sampler,
)
from diffusion.schedule import alpha_sigma
from tests.toys import COSINE, STUDENTS

MEAN, STD = 0.3, 0.6


def gaussian_denoise(z, logsnr):
    """The exact E[x | z] for data N(MEAN, STD^2)."""
    alpha, sigma = alpha_sigma(logsnr, z)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x = MEAN + gain * (z - alpha * MEAN)
    return Prediction(x, eps_from_x(z, x, logsnr))


def exact_flow(z, first, last):
    """The probability flow of Gaussian data keeps (z - alpha mean) / std(z)."""

    def moments(logsnr):
        alpha2, sigma2 = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
        return alpha2.sqrt() * MEAN, (alpha2 * STD**2 + sigma2).sqrt()

    (m0, s0), (m1, s1) = moments(first), moments(last)
    return m1 + s1 / s0 * (z - m0)


def slope(sampler, counts=(32, 64, 128, 256)):
    z = torch.randn(8, 1, 2, 2, dtype=torch.float64)
    errors = []
    for n in counts:
        levels = torch.linspace(-5, 5, n + 1, dtype=torch.float64)
        error = sampler(gaussian_denoise, z, levels) - exact_flow(z, levels[0], levels[-1])
        errors.append(error.abs().max().item())
    return [math.log2(a / b) for a, b in pairwise(errors)]


def test_ddim_converges_with_order_one():
    assert all(0.9 < order < 1.1 for order in slope(ddim))


def test_dpm_solver_converges_with_order_two():
    assert all(1.8 <= order < 2.2 for order in slope(dpm_solver_2m))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("last", [5.0, torch.inf])
def test_ancestral_is_the_exact_linear_recursion(mix, last):
    """A linear denoiser makes the sampler linear: its coefficients on z and on each noise drawn,
    read off by giving each its own pixel, are compared with q(z_s | z_t, x) in its usual form."""
    n, a, b = 7, 0.4, 0.1
    levels = torch.cat([torch.linspace(-5, 4, n), torch.tensor([last])]).double()
    directions = torch.eye(n + 1, dtype=torch.float64).reshape(n + 1, 1, 1, 1, n + 1)

    def run(z, noises):
        def linear(z, logsnr):
            return Prediction(a * z + b, torch.zeros_like(z))

        queue = iter(noises)
        return ancestral(
            linear, z, levels, draw_noise=lambda: next(queue), log_variance_mix=mix
        ).flatten()

    zeros = torch.zeros(1, 1, 1, n + 1, dtype=torch.float64)
    offset = run(zeros, [zeros] * n)
    coefficients = run(directions[0], directions[1:]) - offset

    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for t, s in pairwise(levels):
        alpha2_t, alpha2_s = torch.sigmoid(t), torch.sigmoid(s)
        sigma2_t, sigma2_s = torch.sigmoid(-t), torch.sigmoid(-s)
        alpha_ts = (alpha2_t / alpha2_s).sqrt()
        sigma2_ts = sigma2_t - alpha_ts**2 * sigma2_s
        on_z, on_x = alpha_ts * sigma2_s / sigma2_t, alpha2_s.sqrt() * sigma2_ts / sigma2_t
        small, large = sigma2_ts * sigma2_s / sigma2_t, sigma2_ts
        noise = 0.0 if s == torch.inf else small ** (1 - mix) * large**mix
        mean = (on_z + on_x * a) * mean + on_x * b
        variance = (on_z + on_x * a) ** 2 * variance + noise
    torch.testing.assert_close(offset, mean.expand(n + 1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coefficients.square().sum(), variance, rtol=1e-10, atol=1e-12)


def test_consistency_sampling_noises_each_x_hat_anew():
    """With a network that always says c, z is alpha c + sigma eps at every level, eps being new."""
    grid = uniform_grid(COSINE, 3)
    noises = list(torch.randn(3, 2, 1, 3, 3, dtype=torch.float64))
    x_hat, seen = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64), []

    def denoise(z, logsnr):
        seen.append((z, logsnr))
        return Prediction(x_hat, eps_from_x(z, x_hat, logsnr))

    queue = iter(noises[1:])
    x = consistency(denoise, noises[0], grid, draw_noise=lambda: next(queue))
    assert torch.equal(x, x_hat)
    for (z, logsnr), eps in zip(seen[1:], noises[1:], strict=True):
        alpha, sigma = alpha_sigma(logsnr, z)
        torch.testing.assert_close(z, alpha * x_hat + sigma * eps)


@pytest.mark.parametrize("name", [*SAMPLERS, "ancestral:medium:0.5"])
def test_every_sampler_ends_on_x_hat_and_calls_back(name):
    z, levels = torch.randn(2, 1, 3, 3), uniform_grid(COSINE, 5)
    seen = []
    x = make_sampler(name)(
        STUDENTS["v"],
        z,
        levels,
        draw_noise=lambda: torch.randn(2, 1, 3, 3),
        on_step=lambda *step: seen.append(step),
    )
    assert [i for i, _, _ in seen] == [4, 3, 2, 1, 0]
    assert torch.equal(seen[0][1], z)
    torch.testing.assert_close(x, seen[-1][2].x)


def test_dpm_solver_and_ddim_agree_on_one_and_two_steps():
    z = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    for n in (1, 2):  # the first and the last step are of first order
        levels = uniform_grid(COSINE, n)
        expected = ddim(STUDENTS["v"], z, levels)
        torch.testing.assert_close(dpm_solver_2m(STUDENTS["v"], z, levels), expected)


@pytest.mark.parametrize("name", ["ddpm", "ancestral:medium:1.5", "ancestral:medium:x", ""])
def test_an_unknown_sampler_lists_the_known(name):
    with pytest.raises(ValueError, match="ddim, ancestral, ancestral:large, dpm_solver"):
        make_sampler(name)
