"""Where a stage begins: the run, the weights before the first update, the grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion.adversarial import Features
from diffusion.grids import (
    Grid,
    coarser_grid,
    grid_at,
    uniform_times,
)
from diffusion.losses import ADVERSARIAL
from models.networks import NetworkSection
from pipeline.build import frozen_features
from pipeline.checkpoint import Checkpoint, digest
from pipeline.checkpoint_checks import State
from pipeline.codec import Codec, open_codec
from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.network import build_network, build_schedule, matching_weights
from pipeline.values import TABLE
from training.resume import require_same_everywhere
from training.stage import Stage
from training.tracking import Tracker
from utils.command import InputError
from utils.processes import World


@dataclass(frozen=True)
class Run:
    """What all stages of a run share. name: of its config; output: its folder.

    tracker: what its curves are sent to, beside TensorBoard; None for nothing. features: what the
    critic of an adversarial loss sees, if there is one.
    """

    config: Config
    name: str
    output: Path
    world: World
    dataset: Dataset
    tracker: Tracker | None = None
    features: Features | None = None

    @property
    def codec(self) -> Codec:
        """What maps images to what the model works on, and back."""
        return open_codec(self.config.codec, self.world.device)


Initial = tuple[Path, Checkpoint]
"""A file whose averaged weights a stage begins with (--initialise), and its checkpoint."""


def base_start(run: Run, initial: Initial | None = None) -> Checkpoint:
    """Returns the base model before its first update.

    initial: what it begins with instead of random weights. Raises InputError that names the first
    key of the config in which the networks differ.
    """
    config, lineage = run.config, {}
    if initial is None:
        torch.manual_seed(config.seed)
        weights = build_network(config, run.world.device).state_dict()
    else:
        weights = _initial_weights(initial, config, run.world)
        lineage = {"initial": digest(weights)}
    return Checkpoint(
        kind="base",
        name=run.name,
        config=config,
        update=0,
        stage=0,
        model=weights,
        lineage=lineage,
    )


def _initial_weights(initial: Initial, config: Config, world: World) -> State:
    """Returns the weights of --initialise. Raises InputError if the config's network differs."""
    path, checkpoint = initial
    require_same_everywhere(path, checkpoint.weights, world)
    values = [one.model_dump() for one in (checkpoint.config, config)]
    keys = [("model", key) for key in values[0]["model"] if key != "dropout"]
    keys += [("diffusion", "prediction"), ("data", "channels"), ("codec", "digest")]
    for section, key in keys:
        there, here = (value[section].get(key) for value in values)
        if there != here:
            raise InputError(
                f"{path}: {section}.{key} is {there} there, but {here} in this run, whose network "
                "its weights do not fit; take the same value, or leave --initialise out"
            )
    return checkpoint.weights


def features_of(config: Config, base: Initial, device: torch.device) -> Features | None:
    """Returns what the critic of a ladder sees, if its loss is adversarial: features of its base.

    base: the first teacher's file, and its checkpoint.
    """
    if ADVERSARIAL not in config.distillation.loss_weights():
        return None
    path, checkpoint = base
    return frozen_features(checkpoint, path, device, config.engine)


def initial_of(files: Sequence[Initial], stages: Sequence[Stage]) -> dict[int, Initial]:
    """Returns what students begin with, by the numbers of their stages.

    A single file is for the first student; each of several for the student of as many steps.
    """
    if len(files) == 1:
        return {stages[0].number: files[0]}
    numbers = {stage.num_steps: stage.number for stage in stages}
    found: dict[int, Initial] = {}
    for path, checkpoint in files:
        number = numbers.get(checkpoint.num_steps)
        if number is None or number in found:
            steps = ", ".join(str(stage.num_steps) for stage in stages)
            made_for = checkpoint.num_steps or "any number of"
            raise InputError(
                f"--initialise {path}: of {made_for} steps; of several files give at most one for "
                f"each student of this ladder ({steps})"
            )
        found[number] = path, checkpoint
    return found


def student_start(
    run: Run, stage: Stage, teacher: Checkpoint, initial: Initial | None = None
) -> Checkpoint:
    """Returns a student before its first update: a copy of its teacher, as far as that fits.

    Salimans & Ho 2022, algorithm 2; of a base model it is the average that is copied. Tensors that
    the student has under the same name and in the same shape are copied, others begin afresh.
    An adaptive grid is a uniform one until train_stage has measured the teacher. initial: what it
    begins with instead, for instance a student of the same steps that is to be improved.
    """
    model, before = student_model(run.config, teacher), teacher.config
    prediction = run.config.distillation.prediction or before.diffusion.prediction
    diffusion = before.diffusion.model_copy(update={"prediction": prediction})
    config = run.config.model_copy(update={"model": model, "diffusion": diffusion})
    weights, lineage = teacher.weights, {"teacher": digest(teacher.weights)}
    if initial is not None:
        weights = _initial_weights(initial, config, run.world)
        lineage["initial"] = digest(weights)
    elif (model, diffusion) != (before.model, before.diffusion):
        torch.manual_seed(run.config.seed)
        network = build_network(config, run.world.device)
        weights = {**network.state_dict(), **matching_weights(weights, network)}
    grid = student_grid(stage, teacher)
    return Checkpoint(
        kind="student",
        name=run.name,
        config=config,
        update=0,
        stage=stage.number,
        grid=tuple(grid.tolist()),
        sampler=stage.method.sampler,
        model=weights,
        lineage=lineage,
    )


def student_model(config: Config, teacher: Checkpoint) -> NetworkSection:
    """Returns the student's network: distillation.student or its teacher's.

    It takes the guidance weight if distillation.guidance says so, or its teacher does. Raises
    InputError if it cannot.
    """
    model = config.distillation.student or teacher.config.model
    guidance = config.distillation.guidance is not None or teacher.config.model.guidance
    model = model.model_copy(update={"guidance": guidance})
    where = "distillation.student" if config.distillation.student else "distillation"
    if wrong := config.misfit(model, where):
        raise InputError(wrong)
    return model


def teacher_grid(teacher: Checkpoint, num_steps: int | None) -> Grid:
    """The grid of a teacher's steps: a student's own, or a uniform one of a base model."""
    return teacher.levels(teacher.num_steps or num_steps)


def student_grid(stage: Stage, teacher: Checkpoint) -> Grid:
    """The grid of a stage's student: levels of its teacher's, equally many steps apart.

    Those of a list of times are the schedule's; of a table, the teacher's nearest ones.
    """
    finer = teacher_grid(teacher, stage.teacher_steps)
    if isinstance(stage.grid, str):
        return coarser_grid(finer, uniform_times(stage.num_steps or 1))
    times = torch.tensor(stage.grid, dtype=torch.float64)
    if teacher.config.diffusion.schedule != TABLE:
        return grid_at(build_schedule(teacher.config), times)
    try:
        return coarser_grid(finer, times)
    except ValueError as error:
        raise InputError(f"distillation.grid: {error}") from None
