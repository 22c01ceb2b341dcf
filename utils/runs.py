"""A run's folder: which checkpoint to go on from, whether it is the same run, how to begin anew."""

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.checkpoint import Checkpoint, load_checkpoint
from utils.command import InputError
from utils.config import Config, differences

# What may change while a run goes on: where things lie and what is drawn, not what is learnt.
FREE_KEYS = {"data.root", "data.workers", "training.checkpoint_every"} | {
    "distillation.checkpoint_every"
}


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The files <prefix><number>.pt of a folder, the highest number first."""
    found = [
        (int(number), path)
        for path in folder.glob(f"{prefix}*.pt")
        if (number := path.stem.removeprefix(prefix)).isdecimal()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(paths: Sequence[Path]) -> tuple[Path, Checkpoint] | None:
    """The first of the checkpoints that can be read; one warning for each that cannot."""
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except InputError as error:
            warn(f"{error}; taking the one before it")
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


def delete_run(folder: Path, patterns: Sequence[str]) -> None:
    """Deletes what an earlier run wrote, and nothing else."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
