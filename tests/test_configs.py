"""Configs made up by hypothesis, through main(argv): a step is trained, or a line says why not."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from pipeline.config import Config

EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", 300))
WRONG = [None, True, -1, 0, 0.5, "x", [], {}, [1, "x"], 1e300, ".nan", 2**70]


def mostly(*values):
    """One of the values that may be right, now and then something else."""
    return st.sampled_from([*values * 20, *WRONG])


KEYS = {
    "seed": mostly(0, 7),
    "data.image_size": mostly(8, 16, 8, 16, 12, 7),
    "data.channels": mostly(1, 3),
    "data.horizontal_flip": mostly(True, False),
    "model.name": mostly("unet", "dit", "vit"),
    "model.channels": mostly(4, 8, 12, 9, 33),
    "model.embedding_channels": mostly(None, 8, 5),
    "model.channel_multipliers": mostly([1], [1, 2], [2, 1], [1, 1, 1], [1, 2, 3, 4]),
    "model.blocks_per_level": mostly(1, 2),
    "model.attention_resolutions": mostly([], [4], [8, 4], [2]),
    "model.attention_heads": mostly(1, 2, 3),
    "model.attention_head_dim": mostly(None, 4, 3),
    "model.dropout": mostly(0.0, 0.5),
    "model.resample": mostly("block", "conv", "plain", "pool"),
    "model.patch_size": mostly(1, 2, 4),
    "model.num_classes": mostly(None, 2, 3),
    "diffusion.prediction": mostly("x", "eps", "v", "both", "dual", "V"),
    "diffusion.schedule": mostly("cosine", "linear"),
    "diffusion.logsnr_min": mostly(-20.0, -1.0, 3.0, -20.5),
    "diffusion.logsnr_max": mostly(20.0, 5, -3.0, 20.5),
    "diffusion.clip": mostly(False, True),
    "diffusion.loss_weight": mostly(
        "constant", "snr", "snr_trunc", "snr_plus_one", "snr_capped", "snr+1"
    ),
    "training.updates": mostly(1, 2),
    "training.batch_size": mostly(1, 2, 5),
    "training.accumulate": mostly(1, 2),
    "training.learning_rate": mostly(1e-3, 1e-9, 1e30),
    "training.learning_rate_decay": mostly("none", "linear"),
    "training.times": mostly("uniform", "stratified"),
    "training.warmup": mostly(0, 1000),
    "training.weight_decay": mostly(0.0, 0.1),
    "training.ema_decay": mostly(0.0, 0.9999),
    "training.label_dropout": mostly(0.0, 0.1),
    "training.gradient_clip": mostly(None, 1.0),
    "training.checkpoint_every": mostly(1, 10),
    "training.keep_checkpoints": mostly(None, 2),
    "training.milestone_every": mostly(None, 3),
    "distillation.first_steps": mostly(512, 12, 1),
    "distillation.iterations": mostly(1, 2, 7),
    "distillation.updates_per_stage": mostly(5, [1, 2], [1]),
    "distillation.learning_rate": mostly(1e-4, [1e-4]),
    "distillation.time_exponent": mostly(1.0, [3.0], 10.0, 0.5),
    "sampling.steps": mostly(1, 2),
    "sampling.sampler": mostly("ddim", "ancestral", "ancestral:medium:0.2", "dpm_solver++", "ddpm"),
    "sampling.clip": mostly(True, False),
    "sampling.grid": mostly(1, 3),
    "engine.precision": mostly("fp32", "bf16", "fp16", "fp8"),
    "engine.tf32": mostly(True, False),
    "engine.cpu_sampling": mostly(True, False),
    "engine.cuda_graphs": mostly(True, False),
    "engine.fast": st.sampled_from(WRONG),
    "traning.updates": st.sampled_from(WRONG),
}
SMALL = {
    "data": {"image_size": 8, "workers": 0, "channels": 1},
    "model": {
        "channels": 4,
        "channel_multipliers": [1],
        "attention_resolutions": [],
        "dropout": 0.0,
    },
    "training": {"updates": 1, "batch_size": 2, "warmup": 0},
    "sampling": {"steps": 1, "grid": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of two images."""
    folder = tmp_path_factory.mktemp("images")
    for n in range(4):
        (folder / f"class-{n % 2}").mkdir(exist_ok=True)
        pixels = np.full((9, 8, 3), 60 * n, np.uint8)
        Image.fromarray(pixels).save(folder / f"class-{n % 2}" / f"{n}.png")
    return folder


@pytest.fixture(autouse=True)
def _without_pictures_of_the_loss(monkeypatch):
    monkeypatch.setattr("evaluation.curves.draw_loss_curve", lambda folder: None)


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(st.dictionaries(st.sampled_from(sorted(KEYS)), st.none(), max_size=6), st.data())
def test_a_config_runs_or_one_line_names_the_key(images, keys, data):
    values = {section: dict(entries) for section, entries in SMALL.items()}
    values["data"] |= {"name": "image_folder", "root": str(images)}
    for key in keys:
        section, _, name = key.rpartition(".")
        inner = values.setdefault(section, {}) if section else values
        inner[name] = data.draw(KEYS[key], label=key)
    errors, said = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "x.yaml")
        config.write_text(json.dumps(values))  # which is YAML, without aliases
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
            code = train.main(["--config_path", str(config), "--output", f"{folder}/out"])
        written = sorted(p.name for p in Path(folder).rglob("*") if p.is_file())
    last = errors.getvalue().strip().splitlines()[-1:]
    event(f"exit code {code}")
    if code == 0:
        assert any(name.startswith("diffusion-") and name.endswith(".pt") for name in written)
        return
    assert code == 2, errors.getvalue()
    assert written == ["x.yaml"], "nothing is left of a run that was refused"
    names = [key for key in KEYS if "." in key] + [key.rpartition(".")[2] for key in keys]
    names += [section for key in keys if (section := key.split(".")[0]) not in Config.model_fields]
    assert last[0].startswith("error: ")
    assert any(name in last[0] for name in names), last[0]
