"""Grids of noise levels: the N + 1 logsnrs of N sampling steps, from t = 1 down to +inf.

The last level is +inf (alpha 1, sigma 0) because a sampler ends on x_hat itself (Salimans & Ho
2022, section 2), so that no step needs a rule for the end. Grids are float64.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion.gaussian import Denoise, ddim_step, diffuse
from diffusion.schedule import Schedule

Grid = Float[Tensor, "_"]


def uniform_grid(schedule: Schedule, num_steps: int) -> Grid:
    """The levels at t = 1, 1 - 1/N, .., 1/N, and +inf in the place of t = 0. On the CPU."""
    return grid_at(schedule, uniform_times(num_steps))


def grid_at(schedule: Schedule, times: Float[Tensor, "_"]) -> Grid:
    """The levels of the schedule at times that fall from 1 to 0, and +inf in the place of 0."""
    return torch.cat([schedule(times[:-1]), torch.tensor([torch.inf], dtype=torch.float64)])


def uniform_times(num_steps: int) -> Float[Tensor, "_"]:
    """The times of a uniform grid: 1, 1 - 1/N, .., 1/N, 0."""
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def coarser_grid(grid: Grid, times: Float[Tensor, "_"]) -> Grid:
    """The levels of a grid of T steps at these times, which fall from 1 to 0.

    The level at t is that of index T - round(t T), so that the first and the last are kept, and no
    schedule is needed: of a uniform grid and times n/N it takes every (T/N)-th level. For the table
    of a foreign scheduler this is its trailing spacing, table[round(t T) - 1] (Lin et al. 2024,
    table 2). Raises ValueError if two times fall on one level.
    """
    num_steps = len(grid) - 1
    at = num_steps - (times * num_steps).round().long()
    if not (at[1:] > at[:-1]).all():
        raise ValueError(f"{len(times) - 1} steps on a grid of {num_steps} levels; take fewer")
    return grid[at]


def require_grid(levels: Grid) -> None:
    """Raises ValueError unless the levels fall in noise, strictly, and end at +inf alone."""
    if len(levels) < 2:
        raise ValueError("a grid has at least two levels")
    if not levels[:-1].isfinite().all() or not torch.isposinf(levels[-1]):
        raise ValueError("a grid's levels are finite, but for the last one, which is +inf")
    if not (levels[1:] > levels[:-1]).all():
        raise ValueError("a grid's noise must decrease: each logsnr is larger than the one before")


def positions(grid: Grid, of: Grid) -> Int[Tensor, "m"]:
    """Where the levels of a coarser grid lie in a finer one with the same first level.

    Raises ValueError for a level that the finer grid does not have.
    """
    found = torch.searchsorted(grid, of - 1e-9)  # both grids are sorted; +inf stays +inf
    found = found.clamp(max=len(grid) - 1)
    same = (grid[found] == of) | ((grid[found] - of).abs() < 1e-9)
    if not same.all() or found[0] != 0:
        missing = of[~same].tolist() or [of[0].item()]
        raise ValueError(
            f"the teacher's grid of {len(grid) - 1} steps has no level {missing[0]:.6g}, "
            f"which the student's grid of {len(of) - 1} steps needs"
        )
    return found


@torch.no_grad()
def jump_errors(
    denoise: Denoise, x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], grid: Grid
) -> Float[Tensor, "n n"]:
    """The error of one DDIM step from each level of the grid to each later one.

    The teacher walks the whole grid from z = alpha x + sigma eps at its first level. Entry (i, j)
    is the mean squared difference between its z at level j and one step there from its z at
    level i; 0 for j = i + 1, infinite for j <= i. It takes as many network calls as the grid has
    steps.
    """
    rows = grid[:, None].expand(-1, len(x))
    z = diffuse(x, eps, rows[0])
    walked, predictions = [z], []
    for here, there in pairwise(rows):
        predictions.append(denoise(z, here))
        z = ddim_step(predictions[-1], there)
        walked.append(z)
    errors = torch.full((len(grid), len(grid)), torch.inf, dtype=torch.float64)
    for i, prediction in enumerate(predictions):
        jumps = ((ddim_step(prediction, rows[j]), walked[j]) for j in range(i + 1, len(grid)))
        errors[i, i + 1 :] = torch.stack([(a - b).square().mean() for a, b in jumps]).cpu()
    return errors


def adaptive_grid(grid: Grid, errors: Float[Tensor, "n n"], num_steps: int) -> Grid:
    """The part of a teacher's grid, of num_steps steps, whose largest jump error is smallest.

    No step can then be relieved without making another one worse than all are now: the steps share
    the teacher's error. Of all such parts it is the one with the smallest sum of errors. errors:
    of the teacher, see jump_errors. Raises ValueError for more steps than the grid has.
    """
    if not 1 <= num_steps < len(grid):
        raise ValueError(f"{num_steps} steps of a grid of {len(grid) - 1}")
    largest, _ = _best_route(errors, num_steps, torch.maximum)
    allowed = errors.masked_fill(errors > largest, torch.inf)
    _, route = _best_route(allowed, num_steps, torch.add)
    return grid[route]


def _best_route(errors: Tensor, num_steps: int, join) -> tuple[Tensor, list[int]]:  # type: ignore[no-untyped-def]
    """The smallest joined error of num_steps jumps from the first level to the last, and where."""
    best = torch.full((len(errors),), torch.inf, dtype=errors.dtype)
    best[0] = 0.0
    came_from = []
    for _ in range(num_steps):
        best, origin = join(best[:, None], errors).min(0)
        came_from.append(origin)
    route = [len(errors) - 1]
    for origin in reversed(came_from):
        route.append(int(origin[route[-1]]))
    return best[-1], route[::-1]
