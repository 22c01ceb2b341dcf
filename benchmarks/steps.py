"""Where a student's error comes from: python -m benchmarks.steps --checkpoint S.pt --teacher T.pt.

For each of its steps: the share of images it was trained on at it, its squared error of x on test
images, and how far the teacher's own images, from the same noise, move if this one step is the
student's and all others are the teacher's. The last row is the student alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion.distillation import distillation_loss
from diffusion.gaussian import Denoiser
from diffusion.losses import LOSS_WEIGHTS
from diffusion.samplers import ddim
from diffusion.schedule import Schedule, sampling_levels, transition_levels
from evaluation.gallery import real_images
from pipeline.build import build_schedule, image_shape, load_denoiser
from pipeline.checkpoint import load_checkpoint
from pipeline.codec import encode
from utils.command import InputError, parse, path_name, run_command, say, whole_number
from utils.randomness import ImageNoise, generator

BATCH_SIZE = 100
Leg = tuple[Denoiser, int, int, int]  # by whom, from which level of the teacher's grid, to, stride


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_name, required=True, metavar="STUDENT.pt")
    add("--teacher", type=path_name, required=True, metavar="TEACHER.pt", help="of twice its steps")
    add("--count", type=whole_number(1, 10**7), default=200, help="images of each kind (200)")
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: say(table(**vars(arguments))))


@torch.no_grad()
def table(checkpoint: Path, teacher: Path, count: int) -> str:
    """A row for each step, from noise to image, as Markdown."""
    cpu = torch.device("cpu")
    learnt, taught_by = load_checkpoint(checkpoint), load_checkpoint(teacher)
    config, num_steps = learnt.config, learnt.num_steps
    if num_steps is None or taught_by.num_steps not in (None, 2 * num_steps):
        raise InputError(f"{checkpoint}: not a student of {teacher}, by their numbers of steps")
    if config.model.num_classes is not None:
        raise InputError(f"{checkpoint}: class-conditional; this is for networks without classes")
    schedule = build_schedule(config)
    student, guide = load_denoiser(learnt, checkpoint, cpu), load_denoiser(taught_by, teacher, cpu)
    x = encode(real_images(config).reference[:count])
    noise = ImageNoise(config.seed, range(count), image_shape(config), cpu).draw()
    levels, end = sampling_levels(schedule, 2 * num_steps), 2 * num_steps

    wanted = images(noise, levels, [(guide, 0, end, 1)])

    def moved(*legs: Leg) -> float:
        return (images(noise, levels, legs) - wanted).square().mean().item()

    distillation = config.distillation
    p = distillation.stage(distillation.ladder().index(num_steps)).time_exponent
    lines = ["| step | at t | drawn | squared error of x | images move by |"]
    lines.append("|---:|---:|---:|---:|---:|")
    for i in reversed(range(num_steps)):
        a = end - 2 * (i + 1)
        drawn = ((i + 1) / num_steps) ** p - (i / num_steps) ** p
        error = squared_error(student, guide, schedule, num_steps, i, x)
        here = moved((guide, 0, a, 1), (student, a, a + 2, 2), (guide, a + 2, end, 1))
        lines.append(
            f"| {i} | {(i + 1) / num_steps:.3f} | {drawn:.3f} | {error:.6f} | {here:.5f} |"
        )
    lines.append(f"| all | | | | {moved((student, 0, end, 2)):.5f} |")
    return "\n".join(lines)


def squared_error(
    student: Denoiser, guide: Denoiser, schedule: Schedule, num_steps: int, i: int, x: Tensor
) -> float:
    """The mean squared error of the student's x at its step i, against its target."""
    levels = transition_levels(schedule, num_steps, torch.full((len(x),), i), k=2)
    eps = torch.randn(x.shape, generator=generator("cpu", "steps"))
    parts = zip(
        x.split(BATCH_SIZE),
        eps.split(BATCH_SIZE),
        levels.split(BATCH_SIZE, dim=1),
        strict=True,
    )
    losses = [distillation_loss(student, guide, *part, LOSS_WEIGHTS["constant"]) for part in parts]
    return torch.cat(losses).mean().item()


def images(noise: Tensor, levels: Tensor, legs: Sequence[Leg]) -> Tensor:
    """DDIM along the levels, each leg by its own network; not clipped."""
    parts = []
    for z in noise.split(BATCH_SIZE):
        for denoiser, first, last, stride in legs:
            if first < last:
                z = ddim(denoiser, z, levels[first : last + 1 : stride])
        parts.append(z)
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main())
