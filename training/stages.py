"""The stages of a run: the base model, then students, each the teacher of the next."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.adversarial import Adversary
from diffusion.gaussian import Denoise, conditioned, guided
from diffusion.grids import (
    Grid,
    adaptive_grid,
    jump_errors,
)
from diffusion.losses import ADVERSARIAL, SQUARED_ERRORS, weighted_sum
from diffusion.objectives import Objective, denoising_objective, distillation_objective
from diffusion.schedule import on_device
from models.critic import Critic
from pipeline.build import build_denoiser, load_denoiser
from pipeline.checkpoint import Checkpoint, save_checkpoint
from pipeline.network import BUILDERS, build_schedule, image_shape, load_weights
from pipeline.sampling import SampleRequest
from training.loop import Callbacks, run_stage
from training.resume import StageFiles, require_same_stage
from training.stage import Stage
from training.starts import Run, teacher_grid
from training.trainee import Trainee, make_trainee
from utils.command import InputError, say
from utils.images import by_class, make_grid, save_png
from utils.randomness import generator

PROBES = 32  # images over which an adaptive grid's errors are taken


Draw = Callable[[Run, Trainee, Checkpoint], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """What is trained: what it learns, and what is drawn beside a checkpoint.

    objective: (run, stage, trainee, start, teacher) -> what it learns. draw: (run, trainee,
    checkpoint) -> a picture (C, H, W), and the images in it; None for no picture.
    """

    objective: Callable[[Run, Stage, Trainee, Checkpoint, Checkpoint | None], Objective]
    draw: Draw | None


def train_stage(
    run: Run,
    stage: Stage,
    start: Checkpoint,
    teacher: Checkpoint | None = None,
    task: Task | None = None,
) -> Checkpoint:
    """Trains one network from where an earlier run left it; returns its last checkpoint.

    start: the checkpoint before the first update (base_start or student_start). teacher: of a
    student. task: if another than diffusion. Writes diffusion-<update>.pt of a base model, with a
    grid of samples beside each, or student-<steps>.pt of a student.
    """
    task = task or Task(make_objective, draw_samples if teacher is None else None)
    files = files_of(run, stage)
    newest = files.newest(run.world)
    if newest is not None:
        require_same_stage(*newest, start, stage)
        start = replace(start, grid=newest[1].grid)
    elif stage.grid == "adaptive" and teacher is not None:
        start = replace(start, grid=tuple(teachers_choice(run, stage, teacher).tolist()))
    finished = newest is not None and newest[1].update == stage.updates
    if run.world.leads:
        files.prune(finished)  # a kill may have come before it
    if newest is not None and finished and teacher is not None:
        return newest[1]

    trainee = first_trainee(run, stage, start)
    if newest is not None:
        trainee.restore(newest[1], newest[0])
        say(f"going on from {newest[0]}")

    def snapshot() -> Checkpoint:
        resumable = teacher is None or trainee.update < stage.updates
        return replace(start, **trainee.state(resumable))

    def save() -> None:
        last = trainee.update == stage.updates
        save_checkpoint(files.path(trainee.update, last), snapshot())
        files.prune(finished=last)

    def draw(drawn: Draw) -> Tensor:
        picture, images = drawn(run, trainee, snapshot())
        if run.world.leads:
            path = files.path(trainee.update, last=True).with_suffix(".png")
            save_png(path, picture, scale=2)
        return images

    objective = task.objective(run, stage, trainee, start, teacher)
    title = run.name if stage.num_steps is None else f"student {stage.num_steps}"
    callbacks = Callbacks(save, task.draw and partial(draw, task.draw))
    shared = (run.world, run.output, callbacks, title, run.codec, run.tracker)
    run_stage(trainee, stage, run.dataset, objective, *shared)
    return snapshot()


def files_of(run: Run, stage: Stage) -> StageFiles:
    """The checkpoints of a stage; which ones are kept may be chosen for all but students."""
    if stage.num_steps is not None:
        return StageFiles(run.output, stage.num_steps)
    training = run.config.training
    policy = (training.keep_checkpoints, training.milestone_every, stage.of_autoencoder)
    return StageFiles(run.output, None, *policy)


def first_trainee(run: Run, stage: Stage, start: Checkpoint) -> Trainee:
    """The network of a stage before its first update, with what is trained beside it."""
    dropout = 0.0 if start.kind == "student" else None  # None: the config's
    network = BUILDERS[start.kind](start.config, run.world.device, dropout)
    load_weights(network, start.model, run.output)
    return make_trainee(network, stage, run.world, run.config.engine, make_critic(run, stage))


def draw_samples(run: Run, trainee: Trainee, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Draws a grid of the average's samples. Returns it, and the images."""
    network = trainee.ema or trainee.network
    engine = checkpoint.config.engine.model_copy(update={"compile": False})  # for a picture
    config = checkpoint.config.model_copy(update={"engine": engine})
    denoiser = build_denoiser(config, network, run.world.device)
    request = SampleRequest.of(checkpoint, denoiser, run.world)
    images = request.draw_all(run.config.sampling.grid)
    return make_grid(*by_class(images, request.classes)), images


# --- grids ----------------------------------------------------------------------------------------


def teachers_choice(run: Run, stage: Stage, teacher: Checkpoint) -> Grid:
    """The adaptive grid of a stage's student: the part of the teacher's that shares its error.

    Rank 0 measures the teacher on noised images of the data set; all processes get the same grid.
    """
    grid, device = teacher_grid(teacher, stage.teacher_steps), run.world.device
    if stage.num_steps == len(grid) - 1:
        return grid
    errors = torch.zeros(len(grid), len(grid), dtype=torch.float64)
    if run.world.leads:
        say(f"measuring the errors of the teacher's {len(grid) - 1} steps, for an adaptive grid")
        indices = torch.arange(min(PROBES, run.dataset.num_images))
        images, labels = next(iter(run.dataset.batches([indices])))
        x = run.codec.encode(images)
        rng = generator(device, stage.seed, "adaptive grid", stage.number)
        eps = torch.randn(x.shape, generator=rng, device=device)
        condition = {"label": labels} if stage.conditional else {}
        if stage.guidance is not None:
            low, high = stage.guidance
            condition["guidance"] = torch.linspace(low, high, len(x), device=device)
        denoise = conditioned(teacher_denoiser(run, stage, teacher), **condition)
        errors = jump_errors(denoise, x, eps, on_device(grid, device)).cpu()
    errors = run.world.sum(on_device(errors, device)).cpu().double()
    if not errors[0, 1:].isfinite().all():
        raise InputError(
            "distillation.grid: adaptive, but the teacher's predictions are not finite; take "
            "engine.precision=fp32, or list the times"
        )
    return adaptive_grid(grid, errors, stage.num_steps or 1)


# --- what is learnt -------------------------------------------------------------------------------


def teacher_denoiser(run: Run, stage: Stage, teacher: Checkpoint) -> Denoise:
    """The teacher as a walker.

    Where distillation.guidance asks for it, one that does not take the weight itself is guided: by
    one call of twice the batch.
    """
    denoiser = load_denoiser(teacher, run.output, run.world.device, run.config.engine)
    if stage.guidance is not None and not teacher.config.model.guidance:
        return guided(denoiser, denoiser.clip)
    return denoiser


def make_objective(
    run: Run, stage: Stage, trainee: Trainee, start: Checkpoint, teacher: Checkpoint | None
) -> Objective:
    """What the network of a stage learns."""
    device, config = run.world.device, start.config
    denoiser = build_denoiser(config, trainee.called, device)
    if teacher is None:
        return denoising_objective(
            denoiser,
            build_schedule(config),
            SQUARED_ERRORS[config.diffusion.loss_weight],
            stratified=config.training.times == "stratified",
            label_dropout=config.training.label_dropout,
        )
    grid = teacher_grid(teacher, stage.teacher_steps)
    try:
        paths = on_device(stage.method.paths(grid, start.levels()), device)
    except ValueError as error:
        raise InputError(f"distillation.grid: {error}") from None
    walker = trainee.walker
    average = None if walker is None else build_denoiser(config, walker, device)
    walks = teacher_denoiser(run, stage, teacher)
    legs = stage.method.legs(len(paths) - 1, walks, average)
    weights = {name: weight for name, weight in stage.losses.items() if name != ADVERSARIAL}
    return distillation_objective(
        denoiser,
        legs,
        paths,
        weighted_sum(weights),
        stage.time_exponent,
        stage.guidance,
        make_adversary(run, stage, trainee),
    )


# --- the adversarial loss -------------------------------------------------------------------------


def make_critic(run: Run, stage: Stage) -> Critic | None:
    """The critic of a stage before its first update, if its loss has an adversarial term."""
    if run.features is None or ADVERSARIAL not in stage.losses:
        return None
    z = torch.zeros(1, *image_shape(run.config), device=run.world.device)
    widths = [maps.shape[1] for maps in run.features(z, z.new_zeros(1))]
    torch.manual_seed(generator("cpu", stage.seed, "critic", stage.number).initial_seed())
    return Critic(widths).to(run.world.device)


def make_adversary(run: Run, stage: Stage, trainee: Trainee) -> Adversary | None:
    """The adversarial term of a stage's loss, if it has one."""
    critic, called = trainee.critic, trainee.called_critic
    if critic is None or called is None or run.features is None:
        return None
    return Adversary(critic, called, run.features, stage.losses[ADVERSARIAL])
