"""A run's folder: which checkpoint to go on from, whether it is the same run, how to begin anew."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.config import (
    Config,
    DataConfig,
    differences,
    load_config,
    make_config,
    override,
)
from training.metrics import read_metrics
from utils.command import DamagedCheckpoint, InputError, warn
from utils.files import make_folder

# What may change while a run goes on: where things lie and what is drawn, not what is learnt.
FREE_KEYS = {
    "data.root",
    "data.workers",
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


def prune(folder: Path, prefix: str, keep: int | None, milestone_every: int | None) -> None:
    """Deletes all but the newest numbered checkpoints, and the milestones; keep None: none is."""
    for path in numbered(folder, prefix)[keep:] if keep is not None else []:
        number = int(path.stem.removeprefix(prefix))
        if milestone_every is None or number % milestone_every:
            path.unlink()


def newest_whole(paths: Sequence[Path]) -> tuple[Path, Checkpoint] | None:
    """The first of the checkpoints that is whole.

    Each that is damaged is renamed, with a warning: it is no checkpoint any more, and must not
    count as one when older ones are deleted.
    """
    for n, path in enumerate(paths):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            rest = "taking the one before it" if n + 1 < len(paths) else "there is none before it"
            path.replace(path.with_name(f"{path.name}.damaged"))
            warn(f"{error}; set aside as {path.name}.damaged; {rest}")
    return None


def require_same_run(
    path: Path, stored: Config, wanted: Config, sections: Sequence[str], free: Sequence[str] = ()
) -> None:
    """Raises InputError with the keys in which a checkpoint's run is not the one asked for."""
    keys = [k for k in differences(stored, wanted, sections) if k not in FREE_KEYS | set(free)]
    if keys:
        raise InputError(
            f"{path}: of a run with another {', '.join(keys)}; ask for the same values to go on, "
            "for another folder (--output), or DELETE that run and begin anew (--restart)"
        )


# What a run writes into its folder: files of numbers under its own prefix, and these.
PREFIXES = {"diffusion-": "the training of a base model", "student-": "a ladder"}
DELETED = ("metrics.jsonl", "images.safetensors", "loss.png")
KEPT = ("ladder.md", "ladder.json", "ladder.png", "comparison.png", ".lock")


def numbered_name(prefix: str, *endings: str) -> re.Pattern[str]:
    """Matches <prefix><number>.pt, <prefix><number>-<number>.pt and so on."""
    return re.compile(rf"({prefix})\d+(-\d+)?\.({'|'.join(endings)})")


def writes(name: str) -> bool:
    """Whether runs write a file of this name, which would be taken for theirs."""
    ours = numbered_name("|".join(PREFIXES), "pt", "png")
    return name in (*DELETED, *KEPT) or ours.fullmatch(name) is not None


def run_in(folder: Path, but: str = "") -> str | None:
    """The kind of run that a folder holds checkpoints or metrics of; but: a prefix not looked for.

    None where it holds none.
    """
    for prefix, kind in PREFIXES.items():
        name = numbered_name(prefix, "pt", r"pt\.damaged")
        if prefix != but and any(name.fullmatch(p.name) for p in folder.glob(f"{prefix}*")):
            return kind
    metrics = folder / "metrics.jsonl"
    for entry in read_metrics(metrics) if metrics.exists() else []:
        prefix = "diffusion-" if entry.get("num_steps") is None else "student-"
        if prefix != but:
            return PREFIXES[prefix]
    return None


def require_no_run(folder: Path, but: str = "") -> None:
    """Raises InputError where a run lives in the folder; but: the prefix of one that may."""
    kind = run_in(folder, but)
    if kind is not None:
        raise InputError(f"{folder}: holds {kind}; give another folder (--output)")


def own_files(folder: Path, prefix: str) -> list[Path]:
    """The files of a run of that prefix which --restart deletes.

    Raises InputError where something of such a name is no file, before anything is done with it.
    """
    name = numbered_name(prefix, "pt", "png", r"pt\.damaged")
    ours = [path for path in folder.glob(f"{prefix}*") if name.fullmatch(path.name)]
    ours += [path for n in DELETED if os.path.lexists(path := folder / n)]
    ours += folder.glob("tensorboard/stage-*/events.out.tfevents.*")
    kept = [path for n in KEPT if os.path.lexists(path := folder / n)]
    for path in [*ours, *kept]:
        if not path.is_file():
            raise InputError(
                f"{path}: no regular file, but the run writes one of this name; move it away, or "
                "give another folder (--output)"
            )
    return ours


def delete_run(folder: Path, prefix: str) -> None:
    """Deletes what an earlier run wrote under names that begin so, and nothing else."""
    for path in own_files(folder, prefix):
        path.unlink()
    for emptied in (*folder.glob("tensorboard/stage-*"), folder / "tensorboard"):
        with suppress(OSError):  # it holds something else
            emptied.rmdir()


def require_same_ladder(folder: Path, ladder: Sequence[int], first_stage: int) -> None:
    """Raises InputError where a student of another ladder lies in the folder.

    ladder: the students' steps, of which the first is made in first_stage. The shorter ladder's
    folder may hold the later students of the longer one.
    """
    for path in sorted(folder.glob("student-*.pt")):
        found = re.fullmatch(r"student-(\d+)(-\d+)?", path.stem)
        if found is None or (steps := int(found[1])) < ladder[-1]:
            continue
        try:
            stage = load_checkpoint(path).stage
        except DamagedCheckpoint:
            continue  # it is set aside when its turn comes
        if steps not in ladder or stage != first_stage + ladder.index(steps):
            raise InputError(f"{path}: of another ladder; give another folder (--output)")


@contextmanager
def kept_to_itself(folder: Path) -> Iterator[bool]:
    """Whether no other process has the folder to itself; if so, this one has it in the block.

    The lock is the process's own (POSIX): no worker inherits it, and a kill frees it. Where the
    file system knows no locks, there is no telling.
    """
    make_folder(folder)
    path = folder / ".lock"
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                yield False
                return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Deletes the temporary files that a killed run left half written."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):  # as files.atomic_write names them
            path.unlink(missing_ok=True)


# --- what a ladder is asked for ------------------------------------------------------------------


def distillation_config(
    teacher: Checkpoint, teacher_path: Path, config_path: Path | None, overrides: list[str]
) -> Config:
    """The checkpoint's config, but for what may be asked for now.

    That is distillation, sampling, engine, data.root and data.workers.
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
    unread = [item.partition("=")[0] for item in overrides]
    ignored += [key for key in unread if key.split(".")[0] in ("output", "training")]
    if ignored:
        warn(
            f"{config_path or '--set'}: {', '.join(ignored)} differ from {teacher_path} or are not "
            "read here; the checkpoint's values hold, and --output says where results go"
        )
    first = given.distillation.first_steps
    if teacher.num_steps is not None and teacher.num_steps != 2 * first:
        raise InputError(
            f"{teacher_path}: makes {teacher.num_steps} steps, so its student cannot make "
            f"{first} (distillation.first_steps, --initial_sampling_steps): "
            + (f"take {teacher.num_steps // 2}" if teacher.num_steps % 2 == 0 else "it is odd")
        )
    data = teacher.config.data.model_copy(update={"workers": given.data.workers})
    asked = any(item.startswith("data.root=") for item in overrides)
    if asked or given.data.name == data.name:  # the folder of other data is no use
        data = data.model_copy(update={"root": given.data.root})
    if not asked and (config_path is None or given.data.name != data.name):
        require_no_download(data, teacher_path, "--set data.root=DIR")
    return teacher.config.model_copy(
        update={
            "distillation": given.distillation,
            "sampling": given.sampling,
            "engine": given.engine,
            "data": data,
        }
    )


READ_ONLY = ("mnist", "colored_mnist", "image_folder")  # data sets that nothing is downloaded of


def require_no_download(data: DataConfig, where: Path, option: str) -> None:
    """Raises InputError if data may be downloaded into a folder that only a checkpoint names.

    option: by which the user names it.
    """
    if data.name not in READ_ONLY and data.root != DataConfig().root:
        raise InputError(
            f"{where}: data.root: {data.root!r} is the checkpoint's, and {data.name} may be "
            f"downloaded into it; name the folder yourself ({option})"
        )


def reference_steps(teacher: Checkpoint, config: Config) -> int:
    """The steps of the images that a ladder is measured by: the base teacher's finest grid."""
    return teacher.num_steps or max(config.sampling.steps, 2 * config.distillation.first_steps)
