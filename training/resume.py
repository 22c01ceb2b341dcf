"""How a stage goes on: its checkpoints in the folder, and whether they are of the same run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.checkpoint import Checkpoint, digest, load_checkpoint
from pipeline.checkpoint_checks import State
from pipeline.config import differences
from pipeline.sections import PER_STAGE
from training.stage import Stage
from utils.command import DamagedCheckpoint, InputError, warn
from utils.processes import World

# What may change while a run goes on: where things lie and what is drawn, not what is learnt.
FREE_KEYS = {
    "data.root",
    "data.workers",
    "codec.file",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.milestone_every",
    "distillation.checkpoint_every",
}


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The files <prefix><number>.pt of a folder, the highest number first."""
    found = [
        (int(number), path)
        for path in folder.glob(f"{prefix}*.pt")
        if (number := path.stem.removeprefix(prefix)).isdecimal()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(
    paths: Sequence[Path], of_autoencoder: bool = False
) -> tuple[Path, Checkpoint] | None:
    """The first of the checkpoints that is whole.

    Each that is damaged is renamed, with a warning: it is no checkpoint any more, and must not
    count as one when older ones are deleted.
    """
    for n, path in enumerate(paths):
        try:
            return path, load_checkpoint(path, of_autoencoder)
        except DamagedCheckpoint as error:
            rest = "taking the one before it" if n + 1 < len(paths) else "there is none before it"
            path.replace(path.with_name(f"{path.name}.damaged"))
            warn(f"{error}; set aside as {path.name}.damaged; {rest}")
    return None


@dataclass(frozen=True)
class StageFiles:
    """The checkpoints of a stage in its run's folder.

    num_steps: of a student, whose last checkpoint is student-<steps>.pt and whose others are
    student-<steps>-<update>.pt; None for a base model, diffusion-<update>.pt, and for an
    autoencoder, autoencoder-<update>.pt.
    """

    folder: Path
    num_steps: int | None
    keep: int | None = None
    milestone_every: int | None = None
    of_autoencoder: bool = False

    @property
    def prefix(self) -> str:
        """What the names of numbered checkpoints begin with."""
        if self.num_steps is not None:
            return f"student-{self.num_steps}-"
        return "autoencoder-" if self.of_autoencoder else "diffusion-"

    def path(self, update: int, last: bool) -> Path:
        """The checkpoint after this update, the last one or not."""
        if self.num_steps is not None and last:
            return self.folder / f"student-{self.num_steps}.pt"
        return self.folder / f"{self.prefix}{update}.pt"

    def newest(self, world: World) -> tuple[Path, Checkpoint] | None:
        """The newest whole checkpoint, the same in all processes: rank 0 looks for it.

        Raises InputError if it is not the same file everywhere: several machines need one folder.
        """
        final = self.path(0, last=True)
        paths = [final] if self.num_steps is not None and os.path.lexists(final) else []
        paths += numbered(self.folder, self.prefix)
        found = newest_whole(paths, self.of_autoencoder) if world.leads else None
        name = world.agree_on("" if found is None else found[0].name)
        if not name:
            return None
        path = self.folder / name
        if found is None:
            found = path, load_checkpoint(path, self.of_autoencoder)
        require_same_everywhere(path, found[1].model, world)
        return found

    def prune(self, finished: bool) -> None:
        """Deletes checkpoints that are not needed any more.

        Of a base model all but the newest ones and the milestones; of a finished student all but
        the last one. Called by one process.
        """
        numbers = numbered(self.folder, self.prefix)
        if self.num_steps is not None:
            doomed = numbers if finished else []
        else:
            doomed = numbers[self.keep :] if self.keep is not None else []
        for path in doomed:
            number = int(path.stem.removeprefix(self.prefix))
            if self.milestone_every is None or number % self.milestone_every:
                path.unlink()


def require_same_everywhere(path: Path, weights: State, world: World) -> None:
    """Raises InputError if the file that the weights were read from differs between machines."""
    if world.size == 1:
        return
    short = int(digest(weights)[:12], 16)
    if world.any(short != world.agree(short)):
        raise InputError(
            f"{path}: not the same file on all machines; give one in a folder that all see"
        )


def require_same_stage(path: Path, stored: Checkpoint, start: Checkpoint, stage: Stage) -> None:
    """Raises InputError unless the stored checkpoint is of this stage of this run.

    It began with the same weights, and nothing differs in the config but what may change while a
    run goes on; a base model may be trained for longer at a constant rate.
    """
    if stored.kind != start.kind or (start.kind != "student" and stored.optimizer is None):
        raise InputError(f"{path}: not a {start.kind} model in training; give another --output")
    if stored.lineage != start.lineage:
        same = "the same to go on, " if _same_teacher(stored, start) else ""
        raise InputError(f"{path}: {_began(stored, start)}; give {same}{_OTHER_FOLDER}")
    sections = ["seed", "data", "codec"]
    sections += ["autoencoder"] if start.kind == "autoencoder" else ["model", "diffusion"]
    free = set(FREE_KEYS)
    if stage.num_steps is None:
        training = start.config.training
        if training.learning_rate_decay == "none" and training.updates >= stored.update:
            free.add("training.updates")
        sections.append("training")
    else:
        old, new = stored.config.distillation, start.config.distillation
        if (stage.teacher_steps, stage.num_steps) in list(pairwise(old.steps())):
            # other students than this one may differ
            free |= {f"distillation.{key}" for key in ("first_steps", "iterations", "ladder")}
            if old.of_student(stage.num_steps) == new.of_student(stage.num_steps):
                free |= {f"distillation.{key}" for key in PER_STAGE}
        sections.append("distillation")
    keys = [k for k in differences(stored.config, start.config, sections) if k not in free]
    if keys:
        raise InputError(
            f"{path}: of a run with another {', '.join(keys)}; ask for the same values to go on, "
            f"for {_OTHER_FOLDER}"
        )


_OTHER_FOLDER = "another folder (--output), or DELETE that run and begin anew (--restart)"


def _same_teacher(stored: Checkpoint, start: Checkpoint) -> bool:
    return stored.lineage.get("teacher") == start.lineage.get("teacher")


def _began(stored: Checkpoint, start: Checkpoint) -> str:
    if not _same_teacher(stored, start):
        return "a student of another teacher"
    if "initial" not in stored.lineage:
        return "of a run that began without --initialise"
    other = " and another file" if "initial" in start.lineage else ""
    return f"of a run that began with --initialise{other}"
