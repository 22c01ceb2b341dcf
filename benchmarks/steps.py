"""Where a student's error comes from: python -m benchmarks.steps --checkpoint S.pt --teacher T.pt.

For each of its steps: the share of images it was trained on at it, its squared error of x on test
images, and how far the teacher's own images, from the same noise, move if this one step is the
student's and all others are the teacher's: the mean, which a few images dominate that become
another digit, and the median. The last row is the student alone.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from diffusion.distillation import METHODS, distillation_loss
from diffusion.gaussian import Denoiser
from diffusion.grids import Grid, positions
from diffusion.losses import constant
from diffusion.paths import neighbours
from diffusion.samplers import ddim
from diffusion.schedule import Schedule
from evaluation.gallery import real_images
from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.codec import encode
from pipeline.network import build_schedule
from training.starts import teacher_grid
from utils.command import InputError, path_name, run_script, say, whole_number
from utils.randomness import ImageNoise, generator

BATCH_SIZE = 100
Part = tuple[Denoiser, Grid]  # of a walk: by whom, along which levels


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_name, required=True, metavar="STUDENT.pt")
    add("--teacher", type=path_name, required=True, metavar="TEACHER.pt")
    add("--count", type=whole_number(1, 10**7), default=200, help="images of each kind (200)")
    return run_script(parser, argv, lambda arguments: say(table(**vars(arguments))))


@torch.no_grad()
def table(checkpoint: Path, teacher: Path, count: int) -> str:
    """A row for each step, from noise to image, as Markdown."""
    cpu = torch.device("cpu")
    learnt, taught_by = load_checkpoint(checkpoint), load_checkpoint(teacher)
    config = learnt.config
    if config.model.num_classes is not None or config.codec.name != "pixels":
        raise InputError(f"{checkpoint}: this is for models of pixels without classes")
    if learnt.num_steps is None:
        raise InputError(f"{checkpoint}: a base model; give a student")
    schedule = build_schedule(config)  # raises InputError
    grid, fine = learnt.levels(), teachers_levels(learnt, taught_by)
    try:
        at, paths = positions(fine, grid).tolist(), neighbours(fine, grid)
    except ValueError as error:
        raise InputError(f"{checkpoint}: not a student of {teacher}: {error}") from None
    if len(fine) <= len(grid):
        raise InputError(f"{checkpoint}: not a student of {teacher}, which makes no more steps")
    student, guide = load_denoiser(learnt, checkpoint, cpu), load_denoiser(taught_by, teacher, cpu)
    x = encode(real_images(config).reference[:count])
    noise = ImageNoise(config.seed, range(count), image_shape(config), cpu).draw()
    wanted = images(noise, [(guide, fine)])

    def moved(*parts: Part) -> str:
        by = (images(noise, parts) - wanted).square().flatten(1).mean(1)
        return f"{by.mean():.6f} | {by.quantile(0.5):.6f}"

    shares, times = shares_drawn(learnt, fine), times_of(grid, schedule)
    lines = ["| step | at t | drawn | squared error of x | images move by | median |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    for n in range(learnt.num_steps):
        i = learnt.num_steps - 1 - n
        missed = squared_error(student, guide, paths[:, i], x)
        before, after = (guide, fine[: at[n] + 1]), (guide, fine[at[n + 1] :])
        here = moved(before, (student, grid[n : n + 2]), after)
        lines.append(f"| {i} | {times[n]:.3f} | {shares[n]:.3f} | {missed:.6f} | {here} |")
    lines.append(f"| all | | | | {moved((student, grid))} |")
    return "\n".join(lines)


def teachers_levels(student: Checkpoint, teacher: Checkpoint) -> Grid:
    """The teacher's grid: its own, or of a base model that of the student's ladder."""
    ladder = student.config.distillation.steps()
    before = [a for a, b in pairwise(ladder) if b == student.num_steps]
    steps = before[0] if before else 2 * (student.num_steps or 1)
    return teacher_grid(teacher, steps)


def shares_drawn(student: Checkpoint, teachers: Grid) -> Tensor:
    """The share of the training images at each of the student's steps, from noise to image."""
    recipe, grid = student.config.distillation, student.levels()
    own = recipe.of_student(len(grid) - 1)
    starts = METHODS[own["method"]].paths(teachers, grid)[0]
    edges = torch.linspace(0, 1, len(starts) + 1, dtype=torch.float64) ** own["time_exponent"]
    steps = torch.searchsorted(grid, starts + 1e-9, right=True) - 1
    return torch.zeros(len(grid) - 1, dtype=torch.float64).index_add_(0, steps, edges.diff())


def times_of(grid: Grid, schedule: Schedule) -> Tensor:
    """The times at which the schedule has the levels, except the last one, to 2^-16."""
    times = torch.linspace(1, 0, 2**16 + 1, dtype=torch.float64)
    return times[torch.searchsorted(schedule(times), grid[:-1] - 1e-9)]


def squared_error(student: Denoiser, guide: Denoiser, levels: Tensor, x: Tensor) -> float:
    """The mean squared error of the student's x at a step, whose levels are (k + 1,)."""
    eps = torch.randn(x.shape, generator=generator("cpu", "steps"))
    legs = [guide] * (len(levels) - 1)
    losses = [
        distillation_loss(student, legs, x, eps, levels[:, None].expand(-1, len(x)), constant)
        for x, eps in zip(x.split(BATCH_SIZE), eps.split(BATCH_SIZE), strict=True)
    ]
    return torch.cat(losses).mean().item()


def images(noise: Tensor, parts: Sequence[Part]) -> Tensor:
    """DDIM along the levels of each part, by its own network; not clipped."""
    drawn = []
    for z in noise.split(BATCH_SIZE):
        for denoiser, levels in parts:
            if len(levels) > 1:
                z = ddim(denoiser, z, levels)
        drawn.append(z)
    return torch.cat(drawn)


if __name__ == "__main__":
    sys.exit(main())
