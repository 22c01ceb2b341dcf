"""CONTRIBUTING.md: its examples, pasted into a copy of the repository, work together."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.checkpoint import load_checkpoint
from tests.toys import tiny
from utils.command import InputError

ROOT = Path(__file__).parents[1]
ROOMS = ("diffusion", "models", "pipeline", "training", "evaluation", "utils", "tests")
HEADER = re.compile(r"# (?:(?P<table>\w+) in )?(?P<file>[\w/]+\.py)\n")
CONFIG = tiny(
    model={"name": "mlp", "channels": 16},
    distillation={"ladder": [8, 2], "method": "halfway", "updates_per_stage": 2},
    sampling={"steps": 8, "grid": 4},
)
CONFIG["model"] = {"name": "mlp", "channels": 16}

ORDER = """
from diffusion.samplers import SAMPLERS
from tests.diffusion.test_samplers import slope
print(*slope(SAMPLERS["heun"]))
"""


def blocks():
    """(table or None, file, code) of every Python block."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        header = HEADER.match(code)
        assert header, code
        found.append((header["table"], header["file"], code[header.end() :]))
    return found


def paste(folder, table, file, code):
    """Pastes a block: a function before the first of its file, an entry as the first of its table.

    Import lines above an entry go before the table; a file that is not there is made.
    """
    path = folder / file
    if not path.exists():
        assert table is None
        path.write_text(code)
        return
    lines = path.read_text().splitlines(keepends=True)
    if table is None:
        (at, *_) = [n for n, line in enumerate(lines) if re.match(r"@|def |class ", line)]
        lines[at:at] = [code, "\n\n"]
    else:
        imports, _, entry = code.rpartition("\n\n")
        (at,) = [n for n, line in enumerate(lines) if re.match(rf"{table}\b.* = \S*[{{\[]$", line)]
        lines[at : at + 1] = [f"{imports}\n", lines[at], entry]
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code with all examples in it."""
    folder = tmp_path_factory.mktemp("contributed")
    for room in (*ROOMS, "tests/diffusion"):
        (folder / room).mkdir()
        for path in (ROOT / room).glob("*.py"):
            shutil.copy(path, folder / room)
    for script in ("train.py", "distill.py", "sample.py"):
        shutil.copy(ROOT / script, folder)
    found = blocks()
    assert {table for table, *_ in found} == {None, "METHODS", "SAMPLERS", *NETWORK_TABLES}
    for block in found:
        paste(folder, *block)
    return folder


NETWORK_TABLES = ("NETWORKS", "NetworkSection")


def python(folder, *arguments):
    """What python prints in the folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_examples_train_distil_and_sample_together(copy):
    values = {**CONFIG, "data": {"root": str(ROOT / "data")}}
    (copy / "tiny.yaml").write_text(yaml.safe_dump(values))
    code = """
import distill, sample, train
assert train.main(["--config_path", "tiny.yaml", "--output", "base"]) == 0
base = ["--teacher_model_checkpoint", "base/diffusion-4.pt", "--output", "ladder"]
assert distill.main(base) == 0
student = ["--checkpoint", "ladder/student-2.pt", "--output", "drawn.png"]
assert sample.main([*student, "--sampler", "heun"]) == 0
"""
    out = python(copy, "-c", code)
    assert "2 steps of heun: drawn.png" in out
    assert (copy / "drawn.png").stat().st_size > 0
    # Without the examples nothing knows these names.
    with pytest.raises(InputError, match="'mlp' is not one of unet"):
        load_checkpoint(copy / "ladder" / "student-2.pt")


def test_the_example_of_a_sampler_is_of_second_order(copy):
    assert all(1.8 < float(order) < 2.2 for order in python(copy, "-c", ORDER).split())


def test_the_example_of_a_method_is_the_papers_for_two_legs(copy):
    code = """
import torch
from diffusion.grids import uniform_grid
from diffusion.paths import halfway, neighbours
from tests.toys import COSINE
four, eight = uniform_grid(COSINE, 4), uniform_grid(COSINE, 8)
assert torch.equal(halfway(eight, four), neighbours(eight, four))
two = uniform_grid(COSINE, 2)
assert torch.equal(halfway(eight, two), neighbours(four, two))
print("equal")
"""
    assert python(copy, "-c", code) == "equal\n"
