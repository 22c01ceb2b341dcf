"""How the C library's allocator keeps memory."""

import ctypes
import os
import sys

# Parameters of mallopt(3) in the GNU C library, and values that fit its argument, an int.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}


def keep_memory() -> bool:
    """Lets the allocator keep freed memory for the next allocation. Returns whether it can.

    By default the GNU C library returns large blocks to the system when they are freed, and an
    update of a network then spends a tenth of its time on faulting the same pages in again. Has no
    effect with other C libraries, and in an environment that sets MALLOC_ variables.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(parameter, value) for parameter, value in KEPT.items())
