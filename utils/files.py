"""Atomic file writes, and checks of paths."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.command import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file that replaces the path if the block succeeds; deletes it otherwise.

    Raises OSError with the path if the disk is full, even if the writer raised another error.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):  # torch.save raises a RuntimeError in its place
            raise OSError(cause.errno, f"not written: {cause.strerror}", str(path)) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces the content of the file by the text."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # file names may contain lone surrogates


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of the block: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def make_folder(path: Path) -> None:
    """Creates the folder and its parents. Raises InputError if one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        other = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        raise InputError(f"{other}: a file, where a folder is asked for") from None


def require_regular_file(path: Path) -> None:
    """Raises InputError for a pipe, socket or device, which could block when opened.

    Follows symbolic links. Raises FileNotFoundError, PermissionError and IsADirectoryError as
    open() does.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file; pipes, sockets and devices are not read")
