"""Progress bars with rate and time left."""

import sys
from typing import Any

from tqdm import tqdm

from utils.terminal import leads, printable


def progress_bar(
    total: int, title: str, unit: str, initial: int = 0, leave: bool = True, shown: bool = True
) -> Any:
    """Returns a tqdm bar on standard error. In a log file it writes a line every half minute."""
    return tqdm(
        total=total,
        initial=initial,
        desc=printable(title),
        unit=unit,
        leave=leave,
        disable=not (shown and leads()),
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
