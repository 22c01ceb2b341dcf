"""What all scripts share: arguments, one-line errors, exit codes, signals.

Imports nothing slow, so that --help answers at once.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from utils.memory import keep_memory
from utils.terminal import Terminal as Terminal
from utils.terminal import leads, printable, safe_streams
from utils.terminal import say as say
from utils.terminal import warn as warn

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
# Ctrl-C, a closed terminal, kill, a batch system's CPU limit: a run saves and ends.
STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU)
STALLED = 10  # seconds to wait for the next images after a request to stop
GO_ON = "run the same command again to go on"
PRECISIONS = ("fp32", "bf16", "fp16")
TRACKERS = ("trackio", "wandb")


class InputError(Exception):
    """Bad input, described in one line: the file, the key, what is wrong, what would be right."""


class DamagedCheckpoint(InputError):
    """A checkpoint is truncated or altered. An earlier one of the run may still be whole."""


class DataError(InputError):
    """An image cannot be read. Raised between two updates, so that the run can be saved first."""


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says where."""


def _fail(message: str, code: int) -> int:
    # Every process prints its own error, which may concern its machine alone.
    who = "" if leads() else f"rank {os.environ['RANK']}: "
    print(printable(who + " ".join(message.split())), file=sys.stderr)
    return code


def run_script(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    work: Callable[[argparse.Namespace], None],
    then: str = "",
) -> int:
    """Parses the command line, does the work with the arguments and returns the exit code.

    then: what the user can do after stopping it. See run_command.
    """
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    if getattr(arguments, "restart", False):
        then += ", but without --restart, which would DELETE it"
    return run_command(lambda: work(arguments), then)


@safe_streams()
def run_command(work: Callable[[], None], then: str = "") -> int:
    """Does the work and returns the exit code: 0, 2 with one line on bad input, 130 if stopped.

    then: what the user can do after stopping it.
    """
    keep_memory()
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


# How torch, its allocator and the loader of shared libraries say it. The messages are compared
# because importing torch for its exception classes would be slow.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can(no|')t allocate memory|not enough memory|failed to map segment",
    re.IGNORECASE,
)


@safe_streams()
def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace | int:
    """Returns the parsed arguments, or the exit code after --help or a usage error."""
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
    """Returns an argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        with suppress(ValueError):  # int() also refuses thousands of digits
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text[:40]}: take a whole number from {low} to {high}")

    return number


SEED = whole_number(-(2**63), 2**63)


def path_name(text: str) -> Path:
    """An argparse type: the path of a file or folder. Empty names are refused."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: not the name of a file or folder")
    return Path(text)


def installed_tracker(text: str) -> str:
    """An argparse type: one of TRACKERS, whose package must be installed."""
    if text not in TRACKERS:
        raise argparse.ArgumentTypeError(f"{text[:40]}: take {' or '.join(TRACKERS)}")
    found = importlib.util.find_spec(text)
    if found is None or found.origin is None:  # no origin: a mere folder, as wandb makes one
        raise argparse.ArgumentTypeError(f"{text}: not installed; pip install {text}")
    return text


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that trains, --device included."""
    add = parser.add_argument
    example = "set any value of the config, e.g. --set training.batch_size=64 model.channels=32"
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=example)
    add("--output", type=path_name, metavar="DIR", help="where the results go")
    restart = "DELETE the checkpoints of an earlier run in the output folder and begin anew"
    add("--restart", action="store_true", help=restart)
    track = f"send the curves to a tracker too, beside TensorBoard: {' or '.join(TRACKERS)}"
    add("--track", type=installed_tracker, metavar="TRACKER", help=track)
    config = "print the whole config, checked, as YAML that --config_path reads, and stop"
    add("--print_config", action="store_true", help=config)
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, xpu; by default a GPU if there is one"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --precision and --compile, of sampling."""
    precision = "of the networks; by default fp32 on a CPU, on a GPU as the model was trained"
    parser.add_argument("--precision", choices=PRECISIONS, help=precision)
    compiled = "compile the networks: a minute at first, then faster"
    parser.add_argument("--compile", action="store_true", help=compiled)


Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handled(number: int, handler: Handler) -> Iterator[None]:
    """Installs a signal handler while the block runs; does nothing outside the main thread.

    A signal that is ignored, as nohup does with SIGHUP, stays ignored. Ctrl-C is the exception:
    shells ignore it for background jobs.
    """
    ignored = number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN
    try:
        before = signal.SIG_IGN if ignored else signal.signal(number, handler)
    except ValueError:  # only the main thread may install handlers
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
    """Records a signal to stop, for a loop that checks it between two updates.

    requested: a signal has come. urgent: set while nothing could be lost, so that a signal stops
    the run at once. waiting: set while the loop waits for images; if none come within STALLED
    seconds of a request, DataError is raised.
    """

    def __init__(self) -> None:
        self.requested = self.urgent = self.insisted = self.waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only these two count as asking again: SIGHUP may come twice, SIGXCPU comes every second.
        insists = number in (signal.SIGINT, signal.SIGTERM)
        if self.urgent or (insists and self.insisted):  # asked twice: do not wait
            raise KeyboardInterrupt
        self.insisted |= insists
        if not self.requested:
            self.requested = True
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this update; once more to stop without saving\n")
            if signal.getsignal(signal.SIGALRM) == self._stalled:
                signal.setitimer(signal.ITIMER_REAL, STALLED)

    def between(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, with waiting set while the next one is fetched."""
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
    """Yields a StopRequest that records the signals to stop while the block runs."""
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
