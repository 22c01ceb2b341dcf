"""Memory that is freed is used again, without another page fault."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

GNU = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
PROGRAM = """
import resource, sys
from utils.memory import keep_memory
if "keep" in sys.argv:
    print(keep_memory())
def rounds(count):
    for _ in range(count):
        blocks = [bytearray(5_000_000) for _ in range(20)]
        for block in blocks:
            block[::4096] = bytes(len(range(0, len(block), 4096)))
        del blocks
rounds(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=clean | environment,
        cwd=Path(__file__).parents[1],
    )
    return result.stdout.split()


@GNU
def test_freed_memory_is_kept():
    kept, few = faults("keep")
    (many,) = faults()
    assert kept == "True"
    assert int(few) < 0.1 * int(many)


@GNU
def test_an_environment_that_has_chosen_is_left_alone():
    kept, _ = faults("keep", MALLOC_ARENA_MAX="2")
    assert kept == "False"
