"""Twelve kills of the scripts that train; make torture does two hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

KILLS = os.environ.get("KILLS", "12")


def test_a_killed_run_loses_nothing():
    result = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", KILLS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(f"\n{result.stdout}")
    kills, inside = re.search(r"(\d+) kills, (\d+) of them", result.stdout).groups()
    assert kills == KILLS
    assert int(inside) >= int(kills) / 4
    assert "all the same" in result.stdout
    for place in ("a process of its own: at random", "stage > save > "):
        assert place in result.stdout
