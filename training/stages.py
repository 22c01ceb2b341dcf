"""The stages of a run: the base model, and students that do two of their teacher's steps in one."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.build import build_denoiser, build_schedule
from pipeline.checkpoint import Checkpoint, State, digest, load_checkpoint, save_checkpoint
from pipeline.config import Config, Stage
from pipeline.data import Dataset
from pipeline.network import build_network, load_weights
from pipeline.sampling import SampleRequest
from training.folder import (
    delete_run,
    kept_to_itself,
    newest_whole,
    numbered,
    own_files,
    prune,
    require_no_run,
    require_same_run,
    sweep,
)
from training.loop import (
    Callbacks,
    Plan,
    Trainee,
    base_objective,
    base_rate,
    decay_to_zero,
    load_optimizer,
    make_optimizer,
    run_stage,
    student_objective,
)
from utils.command import InputError, say
from utils.images import by_class, make_grid, save_png
from utils.processes import World


@dataclass(frozen=True)
class Run:
    """What every stage of a run shares. name: of its config; output: its folder."""

    config: Config
    name: str
    output: Path
    world: World
    dataset: Dataset

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, whose gradients would vanish; does nothing otherwise."""
        fp16 = self.config.engine.precision == "fp16"
        return torch.amp.GradScaler(self.world.device.type, enabled=fp16)

    def newest(self, paths: list[Path]) -> tuple[Path, Checkpoint] | None:
        """The first of the paths, in order, that is a whole checkpoint: the same for all.

        Rank 0 looks, and what it finds the others read. Raises InputError where that is not the
        same file: several machines need one folder.
        """
        found = newest_whole(paths) if self.world.leads else None
        name = self.world.agree_on("" if found is None else found[0].name)
        if not name:
            return None
        path = self.output / name
        if found is None:
            found = path, load_checkpoint(path)
        self.require_same_everywhere(path, found[1].model)
        return found

    def require_same_everywhere(self, path: Path, weights: State) -> None:
        """Raises InputError where the file that the weights were read from differs by machine."""
        short = int(digest(weights)[:12], 16)
        if self.world.any(short != self.world.agree(short)):
            raise InputError(
                f"{path}: not the same file on all machines; give one in a folder that all see"
            )

    def plan(
        self,
        stage: int,
        updates: int,
        learning_rate: Callable[[int], float],
        *,
        updates_after: int = 0,
        ema_decay: float | None = None,
        noted: dict[str, Any] | None = None,
    ) -> Plan:
        """How a stage is trained: stage 0 as config.training says, others as distillation does."""
        recipe = self.config.training if stage == 0 else self.config.distillation
        return Plan(
            seed=self.config.seed,
            stage=stage,
            updates=updates,
            batch_size=recipe.batch_size,
            learning_rate=learning_rate,
            gradient_clip=recipe.gradient_clip,
            checkpoint_every=recipe.checkpoint_every,
            accumulate=recipe.accumulate,
            updates_after=updates_after,
            ema_decay=ema_decay,
            noted=noted or {},
            horizontal_flip=self.config.data.horizontal_flip,
            conditional=self.config.model.num_classes is not None,
        )


@contextmanager
def begun(run: Run, prefix: str, restart: bool) -> Iterator[None]:
    """The run's folder, ready and kept from other runs while the block runs.

    What a kill left half written goes; on restart, the old run: not where torchrun has started the
    processes again, as what is there then is this run's own. Raises InputError for a restart on
    several machines, whose number may change while they run, where another run writes there, or
    one of another kind has written.
    """
    if restart and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise InputError(
            f"--restart: not on several machines, which torchrun may start again; delete "
            f"{run.output} yourself, or give another folder (--output)"
        )
    own_files(run.output, prefix)  # or refused
    require_no_run(run.output, but=prefix)
    run.world.wait()  # before anything is deleted
    with kept_to_itself(run.output) if run.world.leads else nullcontext(True) as alone:
        if run.world.any(not alone):
            raise InputError(
                f"{run.output}: another run is writing there; wait for its end, or give another "
                "folder (--output)"
            )
        if run.world.leads:
            sweep(run.output)
            if restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                delete_run(run.output, prefix)
        run.world.wait()
        yield


def train_base(run: Run, initial: tuple[Path, Checkpoint] | None = None) -> Path:
    """Trains the base model from where an earlier run left it; returns its last checkpoint.

    initial: a file and its checkpoint, with whose weights a new run begins instead of random ones.
    Writes diffusion-<update>.pt, and a grid of samples of the averaged weights beside it.
    """
    config, training = run.config, run.config.training
    torch.manual_seed(config.seed)  # of the initial weights
    network = build_network(config, run.world.device)
    lineage = {} if initial is None else _initialise(run, network, *initial)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = make_optimizer(network, training.weight_decay)
    trainee = Trainee(network, run.world.wrap(network), ema, optimizer, run.scaler())
    newest = run.newest(numbered(run.output, "diffusion-"))
    if newest is not None:
        _require_same_base(*newest, config, lineage)
        _go_on(trainee, *newest)
    sampled = build_denoiser(config, ema, run.world.device)

    def path_now() -> Path:
        return run.output / f"diffusion-{trainee.update}.pt"

    kept = (training.keep_checkpoints, training.milestone_every)
    prune_old = partial(prune, run.output, "diffusion-", *kept)

    def save() -> None:
        save_checkpoint(path_now(), _base_checkpoint(run, trainee, lineage))
        prune_old()

    def draw() -> Tensor:
        request = SampleRequest.of(_base_checkpoint(run, trainee, lineage), sampled, run.world)
        images = request.draw_all(config.sampling.grid)
        if run.world.leads:
            grid = make_grid(*by_class(images, request.classes))
            save_png(path_now().with_suffix(".png"), grid, scale=2)
        return images

    objective = base_objective(
        build_denoiser(config, trainee.called, run.world.device),
        build_schedule(config),
        config.diffusion.loss_weight,
        stratified=training.times == "stratified",
        label_dropout=training.label_dropout,
    )
    if run.world.leads:
        prune_old()  # a kill may have come before it
    plan = run.plan(0, training.updates, base_rate(training), ema_decay=training.ema_decay)
    callbacks = Callbacks(save, draw)
    run_stage(trainee, plan, run.dataset, objective, run.world, run.output, callbacks, run.name)
    return path_now()


def _initialise(run: Run, network: nn.Module, path: Path, initial: Checkpoint) -> dict[str, str]:
    """Puts the checkpoint's averaged weights into the network of a new run; returns its lineage.

    Raises InputError that names the first key of the config in which the networks differ.
    """
    run.require_same_everywhere(path, initial.weights)
    values = [config.model_dump() for config in (initial.config, run.config)]
    keys = [("model", key) for key in values[0]["model"] if key != "dropout"]
    for section, key in [*keys, ("diffusion", "prediction"), ("data", "channels")]:
        theirs, ours = (value[section][key] for value in values)
        if theirs != ours:
            raise InputError(
                f"{path}: {section}.{key} is {theirs} there, but {ours} in this run, whose network "
                "its weights do not fit; take the same value, or leave --initialise out"
            )
    load_weights(network, initial.weights, path)
    return {"initial": digest(initial.weights)}


def _base_checkpoint(run: Run, trainee: Trainee, lineage: dict[str, str]) -> Checkpoint:
    return Checkpoint(
        kind="base",
        name=run.name,
        config=run.config,
        update=trainee.update,
        stage=0,
        num_steps=None,
        model=trainee.network.state_dict(),
        ema=None if trainee.ema is None else trainee.ema.state_dict(),
        optimizer=trainee.optimizer.state_dict(),
        scaler=trainee.scaler.state_dict(),
        lineage=lineage,
    )


def train_student(run: Run, teacher: Checkpoint, position: int) -> Checkpoint:
    """The ladder's student at this position, trained from where an earlier run left it.

    Salimans & Ho 2022, algorithm 2: the student starts as a copy of the teacher (the average of
    a base model, the raw weights of a student), with a fresh optimiser, without dropout and
    average, its learning rate falling to 0. Writes student-<steps>.pt.
    """
    config, distillation = run.config, run.config.distillation
    num_steps, recipe = distillation.ladder()[position], distillation.stage(position)
    updates = recipe.updates
    student = _untrained_student(run, teacher, num_steps)
    final, prefix = run.output / f"student-{num_steps}.pt", f"student-{num_steps}-"
    newest = run.newest([p for p in (final, *numbered(run.output, prefix)) if p.exists()])
    if newest is not None:
        path, stored = newest
        _require_same_stage(path, stored, student, recipe)
        if stored.update == updates:
            for leftover in numbered(run.output, prefix) if run.world.leads else []:
                leftover.unlink()  # of a run killed between its last save and this
            return stored

    network = build_network(config, run.world.device, dropout=0.0)
    frozen = build_network(config, run.world.device, dropout=0.0).requires_grad_(False).eval()
    load_weights(network, student.model, final)
    load_weights(frozen, teacher.weights, final)
    trainee = Trainee(network, run.world.wrap(network), None, make_optimizer(network), run.scaler())
    if newest is not None:
        _go_on(trainee, *newest)

    def snapshot() -> Checkpoint:
        return replace(student, update=trainee.update, model=network.state_dict())

    def save() -> None:
        if trainee.update < updates:
            path = run.output / f"{prefix}{trainee.update}.pt"
            states = (trainee.optimizer.state_dict(), trainee.scaler.state_dict())
            save_checkpoint(path, replace(snapshot(), optimizer=states[0], scaler=states[1]))
        else:
            save_checkpoint(final, snapshot())
            for path in numbered(run.output, prefix):
                path.unlink()

    objective = student_objective(
        build_denoiser(config, trainee.called, run.world.device),
        build_denoiser(config, frozen, run.world.device),
        build_schedule(config),
        num_steps,
        distillation.loss_weight,
        recipe.time_exponent,
    )
    plan = run.plan(
        student.stage,
        updates,
        partial(decay_to_zero, recipe.learning_rate, updates),
        updates_after=distillation.updates_after(position),
        noted={"num_steps": num_steps},
    )
    title = f"student {num_steps}"
    run_stage(trainee, plan, run.dataset, objective, run.world, run.output, Callbacks(save), title)
    return snapshot()


def _untrained_student(run: Run, teacher: Checkpoint, num_steps: int) -> Checkpoint:
    return Checkpoint(
        kind="student",
        name=run.name,
        config=run.config,
        update=0,
        stage=teacher.stage + 1,
        num_steps=num_steps,
        model=teacher.weights,
        lineage={"teacher": digest(teacher.weights)},
    )


def _require_same_base(
    path: Path, stored: Checkpoint, wanted: Config, lineage: dict[str, str]
) -> None:
    """A base model goes on only as the run it was, but for more updates at a constant rate."""
    if stored.kind != "base" or stored.optimizer is None:
        raise InputError(f"{path}: not a base model in training; give another --output")
    if stored.lineage != lineage:
        began = "without --initialise"
        if stored.lineage:
            began = "with --initialise" + (" and another file" if lineage else "")
        raise InputError(
            f"{path}: of a run that began {began}; give the same to go on, another folder "
            "(--output), or DELETE that run and begin anew (--restart)"
        )
    training = wanted.training
    longer = training.learning_rate_decay == "none" and training.updates >= stored.update
    sections = ("seed", "data", "model", "diffusion", "training")
    require_same_run(path, stored.config, wanted, sections, ["training.updates"] if longer else [])


def _go_on(trainee: Trainee, path: Path, stored: Checkpoint) -> None:
    """Puts the trainee where the checkpoint was saved."""
    load_weights(trainee.network, stored.model, path)
    if trainee.ema is not None:
        load_weights(trainee.ema, stored.weights, path)
    try:
        load_optimizer(trainee.optimizer, stored.optimizer or {})
    except ValueError as error:
        raise InputError(f"{path}: optimizer: {error}") from None
    if stored.scaler and trainee.scaler.is_enabled():
        trainee.scaler.load_state_dict(stored.scaler)
    trainee.update = stored.update
    say(f"going on from {path}")


def _require_same_stage(path: Path, stored: Checkpoint, wanted: Checkpoint, recipe: Stage) -> None:
    """A stage goes on only as the stage it was: same teacher, same updates, same recipe."""
    if stored.lineage != wanted.lineage:
        raise InputError(
            f"{path}: a student of another teacher; give another folder (--output), or DELETE "
            "that run and begin anew (--restart)"
        )
    before = stored.config.distillation
    free = ["distillation.first_steps", "distillation.iterations"]
    if before.stage(before.ladder().index(wanted.num_steps or 0)) == recipe:
        keys = ("updates_per_stage", "learning_rate", "time_exponent")
        free += [f"distillation.{key}" for key in keys]
    sections = ("seed", "data", "model", "diffusion", "distillation")
    require_same_run(path, stored.config, wanted.config, sections, free)
