"""What every script has in common: its arguments, its errors in one line, its exit codes.

Imports nothing heavy, so that --help answers at once.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
GO_ON = "run the same command again to go on"


class InputError(Exception):
    """Something the user gave is wrong: one line with the file, the key and what would be right."""


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read whole: there may be one before it."""


class Stopped(Exception):
    """The run was asked to stop, has saved, and says where."""


def run_command(work: Callable[[], None], then: str = "") -> int:
    """Does the work and gives the exit code: 0, 2 with one line on bad input, 130 after Ctrl-C.

    then: what a user who has stopped it may do.
    """
    try:
        with handled(signal.SIGTERM, signal.default_int_handler):  # as Ctrl-C is
            work()
    except InputError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except (Stopped, KeyboardInterrupt) as stopped:
        said = "; ".join(part for part in (str(stopped) or "stopped", then) if part)
        return _fail(said, INTERRUPTED) if leads() else INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror or error}", BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        advice = "take a smaller batch_size or model.channels, or fewer steps or images at a time"
        return _fail(f"error: out of memory; {advice}", BAD_INPUT)
    return OK


# What torch says of GPUs, of its allocator and of sizes beyond any; to import it takes too long.
_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")


def _fail(message: str, code: int) -> int:
    # An error may be that of one machine alone, so every process tells its own.
    who = "" if leads() else f"rank {os.environ['RANK']}: "
    print(who + " ".join(message.split()), file=sys.stderr)
    return code


def leads() -> bool:
    """Whether this process is the one of its run that speaks: torchrun's first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line on standard output, once for a run of several processes."""
    if leads():
        print(message, flush=True)


def warn(message: str) -> None:
    """One line on standard error, once for a run of several processes."""
    if leads():
        print(f"warning: {message}", file=sys.stderr)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace | int:
    """The parsed arguments, or the exit code where argparse has already answered."""
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--set, --output and --device, which mean the same in every script that trains."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="set any value of the config, e.g. --set training.batch_size=64 model.channels=32",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="DELETE the checkpoints of an earlier run in the output folder and begin anew",
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
    """Has a signal handled so while the block runs, where this is the main thread."""
    try:
        before = signal.signal(number, handler)
    except ValueError:  # another thread: whoever owns the main one sees to signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


class StopRequest:
    """Whether Ctrl-C or SIGTERM has come; asked at the end of each update, when a save is whole.

    urgent: nothing would be lost now, so that a signal need not wait.
    """

    def __init__(self) -> None:
        self.requested = self.urgent = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self.urgent:  # the second one does not wait
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nstopping after this update; once more to stop without saving\n")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns Ctrl-C and SIGTERM into a request while the block runs."""
    stop = StopRequest()
    with handled(signal.SIGINT, stop._handle), handled(signal.SIGTERM, stop._handle):
        yield stop
