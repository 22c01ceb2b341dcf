"""One stage of progressive distillation: a copy of the teacher learns to do two steps in one."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from utils.build import build_denoiser, build_network, build_schedule, load_weights
from utils.checkpoint import Checkpoint, digest, save_checkpoint
from utils.command import InputError
from utils.config import Config, differences, load_config, make_config, override
from utils.data import Dataset
from utils.runs import FREE_KEYS, newest_whole, numbered, require_same_run, warn
from utils.training import (
    Plan,
    Trainee,
    decay_to_zero,
    make_optimizer,
    run_stage,
    student_losses,
)


@dataclass(frozen=True)
class LadderRun:
    """What every stage of a ladder shares."""

    config: Config
    name: str
    output: Path
    device: torch.device
    dataset: Dataset


def distillation_config(
    teacher: Checkpoint, teacher_path: Path, config_path: Path | None, overrides: list[str]
) -> Config:
    """The checkpoint's config with distillation and sampling as asked for now, and where data lies.

    Warns in one line of what else was asked for: the network, the diffusion and the data are the
    checkpoint's. Raises InputError for step counts that cannot follow the teacher's.
    """
    if config_path is not None:
        given = load_config(config_path, overrides)
    else:
        values = override(teacher.config.model_dump(mode="json"), overrides)
        given = make_config(
            values, f"{teacher_path} with --set" if overrides else str(teacher_path)
        )
    sections = ("seed", "model", "diffusion", "data")
    ignored = [k for k in differences(teacher.config, given, sections) if k not in FREE_KEYS]
    if ignored:
        warn(
            f"{config_path or '--set'}: {', '.join(ignored)} differ from {teacher_path}; "
            "the checkpoint's values hold"
        )
    first = given.distillation.first_steps
    if teacher.num_steps is not None and teacher.num_steps != 2 * first:
        raise InputError(
            f"{teacher_path}: makes {teacher.num_steps} steps, so its student cannot make "
            f"{first} (distillation.first_steps, --initial_sampling_steps): "
            + (f"take {teacher.num_steps // 2}" if teacher.num_steps % 2 == 0 else "it is odd")
        )
    data = teacher.config.data.model_copy(
        update={"root": given.data.root, "workers": given.data.workers}
    )
    return teacher.config.model_copy(
        update={"distillation": given.distillation, "sampling": given.sampling, "data": data}
    )


def reference_steps(teacher: Checkpoint, config: Config) -> int:
    """The steps of the images that a ladder is measured by: the base teacher's finest grid."""
    return teacher.num_steps or max(config.sampling.steps, 2 * config.distillation.first_steps)


def train_student(run: LadderRun, teacher: Checkpoint, position: int) -> Checkpoint:
    """The stage's student, trained from where an earlier run left it, or loaded if it is done.

    Salimans & Ho 2022, algorithm 2: the student starts as a copy of the teacher (the average of
    a base model, the raw weights of a student), with a fresh optimiser, without dropout and
    average, its learning rate falling to 0. Writes student-<steps>.pt.
    """
    distillation = run.config.distillation
    num_steps, updates = distillation.ladder()[position], distillation.updates(position)
    student = Checkpoint(
        kind="student",
        name=run.name,
        config=run.config,
        update=0,
        stage=teacher.stage + 1,
        num_steps=num_steps,
        model=teacher.weights,
        lineage={"teacher": digest(teacher.weights)},
    )
    final = run.output / f"student-{num_steps}.pt"
    partial_prefix = f"student-{num_steps}-"
    found = [final] * final.exists() + numbered(run.output, partial_prefix)
    path = None
    if (newest := newest_whole(found)) is not None:
        path, stored = newest
        _require_same_stage(path, stored, student, updates)
        if stored.update == updates:
            return stored
        student = stored
        print(f"going on from {path}")

    network = build_network(run.config, run.device, dropout=0.0)
    frozen = build_network(run.config, run.device, dropout=0.0).requires_grad_(False).eval()
    load_weights(network, student.model, path or final)
    load_weights(frozen, teacher.weights, path or final)
    trainee = Trainee(network, None, make_optimizer(network), student.update)
    if student.optimizer is not None:
        trainee.optimizer.load_state_dict(student.optimizer)

    def snapshot(trainee: Trainee) -> Checkpoint:
        done = trainee.update == updates
        return replace(
            student,
            update=trainee.update,
            model=network.state_dict(),
            optimizer=None if done else trainee.optimizer.state_dict(),
        )

    def save(trainee: Trainee) -> None:
        if trainee.update < updates:
            save_checkpoint(run.output / f"{partial_prefix}{trainee.update}.pt", snapshot(trainee))
            return
        save_checkpoint(final, snapshot(trainee))
        for path in numbered(run.output, partial_prefix):
            path.unlink()

    plan = Plan(
        seed=run.config.seed,
        stage=student.stage,
        updates=updates,
        batch_size=distillation.batch_size,
        learning_rate=partial(decay_to_zero, distillation.learning_rate, updates),
        gradient_clip=distillation.gradient_clip,
        checkpoint_every=distillation.checkpoint_every,
        horizontal_flip=run.config.data.horizontal_flip,
        conditional=run.config.model.num_classes is not None,
    )
    losses = student_losses(
        build_denoiser(run.config, network),
        build_denoiser(run.config, frozen),
        build_schedule(run.config),
        num_steps,
        distillation.loss_weight,
    )
    run_stage(
        trainee,
        plan,
        run.dataset,
        losses,
        metrics_path=run.output / "metrics.jsonl",
        save=save,
        title=f"student {num_steps}",
        num_steps=num_steps,
    )
    return snapshot(trainee)


def _require_same_stage(path: Path, stored: Checkpoint, wanted: Checkpoint, updates: int) -> None:
    """A stage goes on only as the stage it was: same teacher, same updates, same recipe."""
    if stored.lineage != wanted.lineage:
        raise InputError(
            f"{path}: a student of another teacher; give another folder (--output), or DELETE "
            "that run and begin anew (--restart)"
        )
    before = stored.config.distillation
    elsewhere = ["distillation.first_steps", "distillation.iterations"]
    if before.updates(before.ladder().index(wanted.num_steps)) == updates:
        elsewhere.append("distillation.updates_per_stage")
    sections = ("seed", "data", "model", "diffusion", "distillation")
    require_same_run(path, stored.config, wanted.config, sections, elsewhere)
