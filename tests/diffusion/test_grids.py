from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.gaussian import ddim_step
from diffusion.grids import (
    adaptive_grid,
    coarser_grid,
    jump_errors,
    positions,
    require_grid,
    uniform_grid,
    uniform_times,
)
from diffusion.samplers import ddim
from tests.toys import COSINE, STUDENTS, mixture_denoise


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 1024])
def test_a_uniform_grid_falls_from_t_1_and_ends_at_infinity(num_steps):
    levels = uniform_grid(COSINE, num_steps)
    assert levels.dtype == torch.float64
    assert levels.shape == (num_steps + 1,)
    assert levels[0] == COSINE(torch.ones(1, dtype=torch.float64))
    require_grid(levels)
    n = num_steps // 2
    expected = COSINE(torch.tensor(1 - n / num_steps, dtype=torch.float64))
    torch.testing.assert_close(levels[n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "levels", [[torch.inf], [-1.0, 2.0], [-1.0, -1.0, torch.inf], [1.0, 0.0, torch.inf]]
)
def test_what_is_no_grid_is_refused(levels):
    with pytest.raises(ValueError, match="grid"):
        require_grid(torch.tensor(levels, dtype=torch.float64))


@given(st.integers(1, 256), st.integers(1, 8))
def test_a_coarser_uniform_grid_is_part_of_a_finer_one(num_steps, k):
    found = positions(uniform_grid(COSINE, k * num_steps), uniform_grid(COSINE, num_steps))
    assert found.tolist() == [k * n for n in range(num_steps + 1)]


@pytest.mark.parametrize("student", [3, 5, 16])
def test_a_grid_that_is_no_part_of_the_teachers_is_refused(student):
    with pytest.raises(ValueError, match=f"teacher's grid of 8 steps .* grid of {student} steps"):
        positions(uniform_grid(COSINE, 8), uniform_grid(COSINE, student))


def test_jump_errors_are_those_of_single_steps_from_the_walk():
    x, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    grid = uniform_grid(COSINE, 4)
    errors = jump_errors(STUDENTS["v"], x, eps, grid)
    z = torch.sigmoid(grid[0]).sqrt() * x + torch.sigmoid(-grid[0]).sqrt() * eps
    at_1 = ddim(STUDENTS["v"], z, grid[:2])
    landed = ddim_step(STUDENTS["v"](at_1, grid[1].expand(3)), grid[3].expand(3))
    walked = ddim(STUDENTS["v"], z, grid[:4])
    assert errors[1, 3].item() == pytest.approx((landed - walked).square().mean().item())
    assert (errors.diagonal(1) == 0).all()
    assert torch.isinf(errors.tril()[torch.tril_indices(5, 5).unbind()]).all()


def largest(errors, at):
    return max(errors[a, b].item() for a, b in pairwise(at))


def test_the_adaptive_grid_halves_the_largest_error_of_the_uniform_one():
    x, eps = torch.randn(2, 64, 1, 4, 4, dtype=torch.float64)
    x = x.sign() + 0.1 * torch.randn_like(x)
    grid = uniform_grid(COSINE, 128)
    errors = jump_errors(mixture_denoise, x, eps, grid)
    adaptive = adaptive_grid(grid, errors, 8)
    require_grid(adaptive)
    assert len(adaptive) == 9
    of_adaptive = largest(errors, positions(grid, adaptive).tolist())
    of_uniform = largest(errors, positions(grid, uniform_grid(COSINE, 8)).tolist())
    assert of_adaptive <= of_uniform / 2


@given(st.integers(0, 2**31), st.integers(3, 7), st.data())
def test_no_other_part_of_the_grid_has_a_smaller_largest_error(seed, num_levels, data):
    num_steps = data.draw(st.integers(1, num_levels - 2))
    rng = torch.Generator().manual_seed(seed)
    errors = torch.rand(num_levels, num_levels, generator=rng, dtype=torch.float64)
    errors = errors.masked_fill(torch.ones_like(errors).tril().bool(), torch.inf)
    grid = uniform_grid(COSINE, num_levels - 1)
    found = largest(errors, positions(grid, adaptive_grid(grid, errors, num_steps)).tolist())
    inner = torch.combinations(torch.arange(1, num_levels - 1), num_steps - 1).tolist()
    assert found == min(largest(errors, [0, *at, num_levels - 1]) for at in inner or [[]])


def test_more_steps_than_the_grid_has_are_refused():
    with pytest.raises(ValueError, match="5 steps of a grid of 4"):
        adaptive_grid(uniform_grid(COSINE, 4), torch.zeros(5, 5, dtype=torch.float64), 5)


@given(st.integers(1, 200), st.integers(1, 8))
def test_every_kth_level_of_a_uniform_grid_is_the_uniform_grid_to_the_bit(num_steps, k):
    """So that a student's grid can be taken from its teacher's, without a schedule."""
    fine, coarse = uniform_grid(COSINE, k * num_steps), uniform_grid(COSINE, num_steps)
    assert torch.equal(coarser_grid(fine, uniform_times(num_steps)), coarse)
    assert torch.equal(fine[::k], coarse)


@pytest.mark.parametrize("num_steps", [8192, 1024, 512, 1000])
def test_long_grids_too(num_steps):
    fine = uniform_grid(COSINE, num_steps)
    for count in (n for n in range(1, num_steps + 1) if num_steps % n == 0):
        assert torch.equal(coarser_grid(fine, uniform_times(count)), uniform_grid(COSINE, count))


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_coarser_grid_has_the_levels_nearest_to_its_times(num_steps, fewer):
    fewer = min(fewer, num_steps)
    grid = uniform_grid(COSINE, num_steps)
    coarse = coarser_grid(grid, uniform_times(fewer))
    require_grid(coarse)
    assert coarse[0] == grid[0]
    at = 1 - positions(grid, coarse) / num_steps
    assert (at - uniform_times(fewer)).abs().max() <= 0.5 / num_steps + 1e-6


def test_no_coarser_grid_has_more_levels_than_the_finer():
    with pytest.raises(ValueError, match="5 steps on a grid of 4 levels"):
        coarser_grid(uniform_grid(COSINE, 4), uniform_times(5))
