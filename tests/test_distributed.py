"""Two processes of torchrun, gloo between them, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.toys import tiny
from utils.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("torchrun")  # what they share is made once


def launch(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training and ladder by one process and by two."""
    folder = tmp_path_factory.mktemp("distributed")
    config = folder / "tiny.yaml"
    values = tiny(model={"dropout": 0.0}, data={"horizontal_flip": True})
    config.write_text(yaml.safe_dump(values))
    said = {}
    for processes in (1, 2):
        base, ladder = folder / f"base-{processes}", folder / f"ladder-{processes}"
        train = ("train.py", "--config_path", config, "--output", base)
        distill = ("distill.py", "--teacher_model_checkpoint", base / "diffusion-4.pt")
        for command in (train, (*distill, "--output", ladder)):
            result = launch(processes, *command)
            assert result.returncode == 0, result.stderr
            said[processes] = result.stdout
    return folder, said


@pytest.mark.parametrize("file", ["base-{}/diffusion-4.pt", "ladder-{}/student-2.pt"])
def test_two_processes_train_what_one_trains(runs, file):
    folder, _ = runs
    one, two = (load_checkpoint(folder / file.format(n)) for n in (1, 2))
    # Adam divides by the gradient's size: rounding shows more where a gradient is almost nothing
    for key, value in one.weights.items():
        torch.testing.assert_close(two.weights[key], value, rtol=1e-3, atol=2e-4)


def test_the_metrics_are_those_of_the_global_batch(runs):
    folder, _ = runs
    for name in ("base", "ladder"):
        one, two = (
            [json.loads(line) for line in (folder / f"{name}-{n}/metrics.jsonl").open()]
            for n in (1, 2)
        )
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            if "loss" not in a:
                continue
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)


def test_only_the_first_process_speaks_and_writes(runs):
    folder, said = runs
    assert said[2].count("distilled to 2 steps") == said[1].count("distilled to 2 steps") == 1
    for name in ("base", "ladder"):
        names = [sorted(p.name for p in (folder / f"{name}-{n}").iterdir()) for n in (1, 2)]
        assert names[0] == names[1]


def test_two_processes_share_the_images(runs, tmp_path):
    folder, _ = runs
    for processes in (1, 2):
        sample = ("sample.py", "--checkpoint", folder / "base-1" / "diffusion-4.pt", "--steps", 2)
        images = ("--count", 7, "--batch_size", 2, "--output", tmp_path / f"{processes}.npz")
        result = launch(processes, *sample, *images)
        assert result.returncode == 0, result.stderr
    one, two = (np.load(tmp_path / f"{n}.npz")["arr_0"].astype(int) for n in (1, 2))
    assert one.shape == two.shape == (7, 32, 32, 1)
    assert np.abs(one - two).max() <= 1


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    folder, _ = runs
    out = tmp_path / "base"
    out.mkdir()
    half = folder / "base-1" / "diffusion-2.pt"
    (out / half.name).write_bytes(half.read_bytes())
    result = launch(2, "train.py", "--config_path", folder / "tiny.yaml", "--output", out)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    one, two = (load_checkpoint(f / "diffusion-4.pt") for f in (folder / "base-1", out))
    for key, value in one.model.items():
        torch.testing.assert_close(two.model[key], value, rtol=1e-3, atol=2e-4)
