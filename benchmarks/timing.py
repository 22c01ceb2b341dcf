"""The CPU time of an update, taken on a few updates of its own."""

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from diffusion.adversarial import onward
from diffusion.losses import ADVERSARIAL
from pipeline.build import build_dataset
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config
from training.loop import train_updates
from training.stage import Stage, base_stage, student_stages
from training.stages import first_trainee, make_objective, teachers_choice
from training.starts import Run, base_start, features_of, student_start, teacher_grid
from utils.processes import World

OF_CRITIC = 3  # calls: five passes through half of a network, rounded up


def timed_stages(
    config: Config, teacher: Checkpoint | None, seconds: float
) -> list[dict[str, Any]]:
    """The stages of a config with the CPU time and the network calls of an update of each.

    calls: for each image. seconds: of CPU time that the measurement of a stage may take.
    """
    world = World(torch.device("cpu"))
    dataset = build_dataset(config, world.device, config.distillation.data if teacher else None)
    run = Run(config, "timed", Path("timed"), world, dataset)
    if teacher is not None:
        run = replace(run, features=features_of(config, (run.output, teacher), world.device))
    stages = [base_stage(config)] if teacher is None else student_stages(config, teacher.stage + 1)
    timed = []
    for stage in stages:
        calls = 1
        if teacher is None:
            start = base_start(run)
        else:
            start = student_start(run, stage, teacher)
            if stage.grid == "adaptive":
                start = replace(start, grid=tuple(teachers_choice(run, stage, teacher).tolist()))
            grid = teacher_grid(teacher, stage.teacher_steps)
            paths = stage.method.paths(grid, start.levels())
            calls = len(paths)  # the student and each leg
            if stage.guidance is not None and not teacher.config.model.guidance:  # two each
                calls += 1 if stage.method.needs_average else len(paths) - 1
            if ADVERSARIAL in stage.losses:
                calls += len(onward(paths)) - 1 + OF_CRITIC
        timed.append(
            {
                "num_steps": stage.num_steps,
                "updates": stage.updates,
                "batch_size": stage.batch_size,
                "calls": calls,
                "seconds": seconds_per_update(run, stage, start, teacher, seconds),
            }
        )
        teacher = start if teacher is not None else None
    return timed


def seconds_per_update(
    run: Run, stage: Stage, start: Checkpoint, teacher: Checkpoint | None, limit: float
) -> float:
    """The CPU time of an update, over some that are not the first, for so long at most."""
    trainee = first_trainee(run, stage, start)
    objective = make_objective(run, stage, trainee, start, teacher)
    endless = replace(stage, updates=2**31)
    updates = train_updates(trainee, endless, run.dataset, objective, run.world, codec=run.codec)
    for _ in islice(updates, 2):
        pass
    begun = time.process_time()
    for count, _ in enumerate(updates, start=1):
        taken = time.process_time() - begun
        if count >= 3 and (taken > limit or count * stage.batch_size >= 2000):
            return taken / count
    raise AssertionError("endless")
