"""Discrete schedules: known values, and what is no schedule."""

import math

import pytest
import torch

from diffusion.betas import BETAS, NO_SIGNAL, grid_of_betas
from diffusion.grids import require_grid


def level(abar):
    return math.log(abar / (1 - abar))


def test_levels_are_the_logsnr_of_each_product():
    grid = grid_of_betas(torch.tensor([0.1, 0.5, 0.75], dtype=torch.float64))
    wanted = [level(0.9 * 0.5 * 0.25), level(0.9 * 0.5), level(0.9), math.inf]
    torch.testing.assert_close(grid, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "first", "last", "abar"),
    [  # the last abar of T = 1000, to six digits, and the first
        ("linear", 0.0001, 0.02, 4.03583e-05),
        ("scaled_linear", 0.00085, 0.012, 4.66012e-03),
        ("squaredcos_cap_v2", 0.0, 0.0, 2.42866e-09),
    ],
)
def test_known_ends(name, first, last, abar):
    betas = BETAS[name](1000, first, last)
    assert betas.dtype == torch.float64
    grid = grid_of_betas(betas)
    require_grid(grid)
    assert len(grid) == 1001
    assert torch.sigmoid(grid[0]).item() == pytest.approx(abar, rel=1e-5)
    assert torch.sigmoid(-grid[-2]).item() == pytest.approx(betas[0].item(), rel=1e-12)


def test_no_terminal_signal_keeps_the_first_level():
    betas = BETAS["linear"](1000, 0.0001, 0.02)
    plain, shifted = grid_of_betas(betas), grid_of_betas(betas, zero_terminal=True)
    require_grid(shifted)
    assert shifted[0] == NO_SIGNAL
    assert shifted[-2].item() == pytest.approx(plain[-2].item(), rel=1e-9)
    assert (shifted[1:-2] < plain[1:-2]).all()
    assert torch.sigmoid(shifted[0].float()).sqrt() * 1.0 < 2e-8


@pytest.mark.parametrize("betas", [[0.1, 0.0, 0.1], [0.5, 1.0, 1.0]])
def test_betas_that_add_no_noise_are_no_grid(betas):
    with pytest.raises(ValueError, match="noise must decrease"):
        require_grid(grid_of_betas(torch.tensor(betas, dtype=torch.float64)))
