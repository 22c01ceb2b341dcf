"""Progress bars: rate and time left, often where somebody looks, seldom in a log file."""

import sys
from typing import Any

from tqdm import tqdm

from utils.terminal import leads, printable


def progress_bar(
    total: int, title: str, unit: str, initial: int = 0, leave: bool = True, shown: bool = True
) -> Any:
    """A tqdm bar on standard error; in a file a line every half minute."""
    return tqdm(
        total=total,
        initial=initial,
        desc=printable(title),
        unit=unit,
        leave=leave,
        disable=not (shown and leads()),
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
