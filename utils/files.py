"""Files that are whole or not there: a temporary name, a flush, a rename."""

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
    """A binary file that takes the path's place when the block ends well, and only then.

    Raises OSError that names the path, whatever a full disk made the writer in the block raise.
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
        if isinstance(cause, OSError):  # torch.save hides it behind an error of its own
            raise OSError(cause.errno, f"not written: {cause.strerror}", str(path)) from None
        raise


def write_text(path: Path, text: str) -> None:
    """The text as the whole content of the file."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # file names may hold what is no letter


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of the block the path: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def make_folder(path: Path) -> None:
    """Creates the folder and those above it. Raises InputError where one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        other = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        raise InputError(f"{other}: a file, where a folder is asked for") from None


def require_regular_file(path: Path) -> None:
    """Raises InputError unless the path is a regular file, so that opening it cannot block.

    Symbolic links are followed. Raises FileNotFoundError, PermissionError and IsADirectoryError
    as open() does.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file; pipes, sockets and devices are not read")
