"""A run's folder: its lock, the files that are its own, how to begin anew."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from pipeline.checkpoint import load_checkpoint
from pipeline.image_folder import IMAGE_SUFFIXES
from training.metrics import read_metrics
from utils.command import DamagedCheckpoint, InputError
from utils.files import make_folder
from utils.processes import World

# What a run writes into its folder: files of numbers under its own prefix, and these.
PREFIXES = {
    "diffusion-": "the training of a base model",
    "student-": "a ladder",
    "autoencoder-": "the training of an autoencoder",
}
DELETED = ("metrics.jsonl", "loss.png", "codec.safetensors", "tracking.json")
KEPT = (
    "autoencoder.safetensors",
    "ladder.md",
    "ladder.json",
    "ladder.png",
    "comparison.png",
    ".lock",
)


def numbered_name(prefix: str, *endings: str) -> re.Pattern[str]:
    """Matches <prefix><number>.pt, <prefix><number>-<number>.pt and so on."""
    return re.compile(rf"({prefix})\d+(-\d+)?\.({'|'.join(endings)})")


def writes(name: str) -> bool:
    """Whether runs write a file of this name, which would be taken for theirs."""
    ours = numbered_name("|".join(PREFIXES), "pt", "png")
    return name in (*DELETED, *KEPT) or ours.fullmatch(name) is not None


def require_elsewhere(output: Path, *files: Path) -> None:
    """Raises InputError if one of the files lies in the folder that the results go to."""
    for path in files:
        if path.parent.resolve() == output.resolve():
            raise InputError(
                f"{path}: is in {output}, with the results of its own run; give another folder "
                "for those of this run (--output)"
            )


def run_in(folder: Path, but: str = "") -> str | None:
    """What kind of run has checkpoints or metrics in the folder; None if there is none.

    but: a prefix to leave out.
    """
    for prefix, kind in PREFIXES.items():
        name = numbered_name(prefix, "pt", r"pt\.damaged")
        if prefix != but and any(name.fullmatch(p.name) for p in folder.glob(f"{prefix}*")):
            return kind
    metrics = folder / "metrics.jsonl"
    for entry in read_metrics(metrics) if metrics.exists() else []:
        prefix = "diffusion-" if entry.get("num_steps") is None else "student-"
        prefix = "autoencoder-" if entry.get("kind") == "autoencoder" else prefix
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
    ours += folder.glob("images/*/[0-9]*.safetensors")
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
    folders = [*folder.glob("tensorboard/stage-*"), *folder.glob("images/*")]
    for emptied in (*folders, folder / "tensorboard", folder / "images"):
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
def open_folder(folder: Path, world: World, prefix: str, restart: bool) -> Iterator[None]:
    """Locks a run's folder for the block; with restart, deletes the run.

    prefix: of the run's checkpoints. A run that torchrun has launched again is not deleted. Raises
    InputError for a restart on several machines, whose number may change while they run, and if
    another run writes there, or one of another kind has written.
    """
    if restart and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise InputError(
            f"--restart: not on several machines, which torchrun may start again; delete "
            f"{folder} yourself, or give another folder (--output)"
        )
    own_files(folder, prefix)  # raises InputError
    require_no_run(folder, but=prefix)
    world.wait()  # before anything is deleted
    with locked(folder, world):
        if world.leads and restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            delete_run(folder, prefix)
        world.wait()
        yield


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Locks the folder for the block, and deletes temporary files.

    Raises InputError if another run writes there.
    """
    with kept_to_itself(folder) if world.leads else nullcontext(True) as alone:
        if world.any(not alone):
            raise InputError(
                f"{folder}: another run is writing there; wait for its end, or give another "
                "folder (--output)"
            )
        if world.leads:
            sweep(folder)
        yield


@contextmanager
def kept_to_itself(folder: Path) -> Iterator[bool]:
    """Locks the folder. Yields True if the lock was acquired.

    A POSIX lock belongs to the process: no worker inherits it, and a kill frees it. On a file
    system without locks it is always acquired.
    """
    make_folder(folder)
    path = folder / ".lock"
    while True:
        with path.open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    yield False
                    return
            if not _is_open(path, file):
                continue  # another process held it, and has deleted it
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_open(path: Path, file: IO[str]) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sweep(folder: Path) -> None:
    """Deletes the temporary files that a killed run left half written."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("images/*/.*.tmp")):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):  # as files.atomic_write names them
            path.unlink(missing_ok=True)


# --- where samples may go -------------------------------------------------------------------------

# Endings of names that nobody means a folder by.
FILE_SUFFIXES = IMAGE_SUFFIXES | {
    *(".npy", ".h5", ".hdf5", ".parquet", ".pkl", ".pickle", ".pt", ".pth", ".safetensors"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"),
    *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".html", ".pdf", ".svg"),
    *(".avif", ".heic", ".jfif", ".mp4", ".mkv", ".webm", ".avi", ".mov"),
}


def require_output(path: Path, many: bool) -> None:
    """Raises InputError, before anything is drawn, where the images cannot go to this path.

    many: a folder of images, or an .npz; else one .png. A run's folder and pictures are its own.
    """
    suffix = path.suffix.lower()
    if not many and suffix != ".png":
        raise InputError(f"--output {path}: a grid is a .png; for files give --count")
    if many and suffix in FILE_SUFFIXES:
        raise InputError(f"--output {path}: with --count, a folder or a .npz")
    if suffix in (".png", ".npz"):
        if path.is_dir():
            raise InputError(f"--output {path}: a folder, where a {suffix} file is asked for")
        if writes(path.name) and run_in(path.parent):
            raise InputError(f"--output {path}: {run_in(path.parent)} writes it; give another name")
    else:
        require_no_run(path)
    folder = path.parent if suffix in (".png", ".npz") else path
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: not allowed to write there")
