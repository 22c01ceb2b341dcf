"""What a program prints: standard streams that never raise, one voice for several processes."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


class Terminal:
    """Wraps a standard stream so that writing never raises: a broken one is no longer written to.

    Characters that its encoding lacks are escaped. So the exit code depends on the work alone.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or nothing if the stream is closed, full or broken."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        # The interpreter flushes the stream again when it exits, which would fail.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Makes standard output and standard error safe to write to while the block runs."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened, perhaps a checkpoint, would get its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    with ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        out, err = Terminal(sys.stdout or null), Terminal(sys.stderr or null)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            yield
        finally:
            out.flush()
            err.flush()


def printable(text: object) -> str:
    """Returns the text with control characters, except newlines, escaped."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def leads() -> bool:
    """Returns whether this process prints for its run: rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Prints a message on standard output, once for a run of several processes."""
    if leads():
        print(printable(message), flush=True)


def warn(message: str) -> None:
    """Prints a warning on standard error, once for a run of several processes."""
    if leads():
        print(printable(f"warning: {message}"), file=sys.stderr)
