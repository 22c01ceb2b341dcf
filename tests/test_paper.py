"""The paper's networks, through train.py and distill.py: one update each, at a batch of one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distill
import train
from pipeline.checkpoint import load_checkpoint
from pipeline.config import load_config
from tests.pipeline.test_config import CONFIGS

NETWORKS = {
    "cifar10": (32, 60_004_099),
    "imagenet64": (64, 295_905_222),
    "lsun128": (128, 139_578_502),
}


@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied afterwards: the largest checkpoint is of 5 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_one_update_of_training_and_one_of_distillation(name, folder, monkeypatch):
    size, parameters = NETWORKS[name]
    config = str(CONFIGS / "paper" / f"{name}.yaml")
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    for n in range(load_config(Path(config), []).model.num_classes or 1):
        (folder / "images" / f"{n:04d}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "images" / f"{n:04d}" / "0.png")
    monkeypatch.setattr("evaluation.report.NUM_IMAGES", 1)
    one = ["data.name=image_folder", f"data.root={folder / 'images'}", "data.workers=0"]
    one += ["training.updates=1", "training.batch_size=1", "sampling.steps=1", "sampling.grid=1"]
    one += ["distillation.first_steps=1", "distillation.iterations=1"]
    one += ["distillation.updates_per_stage=1", "distillation.batch_size=1"]
    one += ["engine.precision=fp32", "engine.compile=false"]
    base, ladder = folder / "base", folder / "ladder"
    assert train.main(["--config_path", config, "--output", str(base), "--set", *one]) == 0
    path = base / "diffusion-1.pt"
    teacher = load_checkpoint(path)
    assert sum(tensor.numel() for tensor in teacher.model.values()) == parameters
    command = ["--config_path", config, "--teacher_model_checkpoint", str(path)]
    assert distill.main([*command, "--output", str(ladder), "--set", *one]) == 0
    student = load_checkpoint(ladder / "student-1.pt")
    assert (student.num_steps, student.update) == (1, 1)
    changed = [k for k, v in student.model.items() if not v.equal(teacher.weights[k])]
    assert changed, "the update reached the weights"
    for run in (base, ladder):
        with (run / "metrics.jsonl").open() as file:
            first = json.loads(file.readline())
        assert first["gradient_norm"] > 0
        assert not first["skipped"]
