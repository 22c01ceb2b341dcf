"""What every script has in common: its arguments, its errors in one line, its exit codes.

Imports nothing heavy, so that --help answers at once.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
# Ctrl-C, a closed terminal, kill, a batch system's limit of CPU time: each ends a run with a save.
STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU)
STALLED = 10  # seconds without an image, after a request to stop
GO_ON = "run the same command again to go on"


class InputError(Exception):
    """Something the user gave is wrong: one line with the file, the key and what would be right."""


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read whole: there may be one before it."""


class DataError(InputError):
    """An image cannot be read. Raised between two updates, so that what was learnt can be saved."""


class Stopped(Exception):
    """The run was asked to stop, has saved, and says where."""


# --- what is printed ----------------------------------------------------------------------------


class Terminal:
    """A standard stream that never raises: a closed, full or broken one is written to no more.

    Letters that its encoding lacks are escaped. So the work alone decides the exit code.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or nothing."""
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
        # The interpreter writes what is buffered once more when it ends, and would fail.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Standard output and standard error never raise while the block runs."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened, perhaps a checkpoint, would take its number
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
    """The text with control characters escaped, which a terminal would obey; newlines stay."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def leads() -> bool:
    """Whether this process is the one of its run that speaks: torchrun's first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line on standard output, once for a run of several processes."""
    if leads():
        print(printable(message), flush=True)


def warn(message: str) -> None:
    """One line on standard error, once for a run of several processes."""
    if leads():
        print(printable(f"warning: {message}"), file=sys.stderr)


def _fail(message: str, code: int) -> int:
    # An error may be that of one machine alone, so every process tells its own.
    who = "" if leads() else f"rank {os.environ['RANK']}: "
    print(printable(who + " ".join(message.split())), file=sys.stderr)
    return code


# --- a script from its arguments to its exit code -------------------------------------------------


@safe_streams()
def run_command(work: Callable[[], None], then: str = "") -> int:
    """Does the work and gives the exit code: 0, 2 with one line on bad input, 130 after Ctrl-C.

    then: what a user who has stopped it may do.
    """
    try:
        with ExitStack() as stack:
            for number in STOP_SIGNALS:
                stack.enter_context(handled(number, signal.default_int_handler))
            work()
    except InputError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except (Stopped, KeyboardInterrupt) as stopped:
        said = "; ".join(part for part in (str(stopped) or "stopped", then) if part)
        return _fail(said, INTERRUPTED) if leads() else INTERRUPTED
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            advice = "smaller batch_size or model.channels, or fewer steps or images at a time"
            if isinstance(error, ImportError):
                advice = "higher limit of the address space (ulimit -v) to load libraries in"
            return _fail(f"error: out of memory; take a {advice}", BAD_INPUT)
        if not isinstance(error, OSError):
            raise
        name = error.filename
        where = f"{os.fsdecode(name) if isinstance(name, bytes) else name}: " if name else ""
        return _fail(f"error: {where}{error.strerror or error}", BAD_INPUT)
    return OK


# What torch says of GPUs, of its allocator and of sizes beyond any, to import whose errors takes
# too long, and the loader of shared libraries of a limited address space.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can(no|')t allocate memory|not enough memory|failed to map segment",
    re.IGNORECASE,
)


@safe_streams()
def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace | int:
    """The parsed arguments, or the exit code where the answer is already given."""
    parser.error = _refuse  # type: ignore[method-assign]
    try:
        return parser.parse_args(argv)
    except InputError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def _refuse(message: str) -> NoReturn:
    raise InputError(re.sub(r"^argument ([^:]+):", r"\1", message))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: a whole number of this range."""

    def number(text: str) -> int:
        with suppress(ValueError):  # also of thousands of digits
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text[:40]}: take a whole number from {low} to {high}")

    return number


SEED = whole_number(-(2**63), 2**63)


def path_name(text: str) -> Path:
    """An argument's type: the path of a file or folder. The empty one is not the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: not the name of a file or folder")
    return Path(text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that mean the same in every script that trains."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="set any value of the config, e.g. --set training.batch_size=64 model.channels=32",
    )
    parser.add_argument("--output", type=path_name, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="DELETE the checkpoints of an earlier run in the output folder and begin anew",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print the whole config, checked, as YAML that --config_path reads, and stop",
    )
    add_device_argument(parser)


def to_go_on(restart: bool) -> str:
    """What a user who has stopped a run may do; restart: the run was begun so."""
    return f"{GO_ON}, but without --restart, which would DELETE it" if restart else GO_ON


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ..; by default a GPU where one is")


Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handled(number: int, handler: Handler) -> Iterator[None]:
    """Has a signal handled so while the block runs, where this is the main thread.

    A signal that is ignored stays so, as nohup has it of SIGHUP; but for Ctrl-C, which shells
    ignore for what they start in the background.
    """
    ignored = number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN
    try:
        before = signal.SIG_IGN if ignored else signal.signal(number, handler)
    except ValueError:  # another thread: whoever owns the main one sees to signals
        ignored = True
    if ignored:
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


Batch = TypeVar("Batch")


class StopRequest:
    """Whether a signal to stop has come; asked at the end of each update, when a save is whole.

    urgent: nothing would be lost now, so that a signal need not wait. waiting: for the next images,
    between two updates; if none come for STALLED seconds after a request, DataError is raised.
    """

    def __init__(self) -> None:
        self.requested = self.urgent = self.insisted = self.waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only people insist: of a closed terminal the shell tells too, of CPU time each second.
        insists = number in (signal.SIGINT, signal.SIGTERM)
        if self.urgent or (insists and self.insisted):  # the second one does not wait
            raise KeyboardInterrupt
        self.insisted |= insists
        if not self.requested:
            self.requested = True
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this update; once more to stop without saving\n")
            if signal.getsignal(signal.SIGALRM) == self._stalled:
                signal.setitimer(signal.ITIMER_REAL, STALLED)

    def between(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; waiting is set while the next one is waited for."""
        iterator = iter(batches)
        while True:
            self.waiting = True
            try:
                batch = next(iterator, None)
            finally:
                self.waiting = False
            if batch is None:
                return
            yield batch

    def _stalled(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            raise DataError(f"no image was read in {STALLED:g} seconds")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the signals to stop into a request while the block runs."""
    stop = StopRequest()
    with ExitStack() as stack:
        for number in STOP_SIGNALS:
            stack.enter_context(handled(number, stop._handle))
        stack.enter_context(handled(signal.SIGALRM, stop._stalled))
        try:
            yield stop
        finally:
            if stop.requested:
                signal.setitimer(signal.ITIMER_REAL, 0)
