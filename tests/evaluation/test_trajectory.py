import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.gallery import Gallery
from evaluation.report import (
    NUM_IMAGES,
    LadderRow,
    draw_pictures,
    ladder_table,
    trajectory_error,
    write_table,
)
from pipeline.checkpoint import Checkpoint
from pipeline.codec import decode
from pipeline.config import make_config
from pipeline.network import build_network
from tests.toys import tiny
from utils.processes import World

CPU = torch.device("cpu")
HERE = Path("a.pt")


def base(config):
    network = build_network(config, CPU)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Checkpoint("base", "tiny", config, 1, 0, network.state_dict())


def test_the_trajectory_error_is_the_mean_square_unclipped():
    a = torch.full((2, 1, 2, 2), 3.0)
    assert trajectory_error(a, a) == 0
    assert trajectory_error(a, -a) == pytest.approx(36.0)
    b = a.clone()
    b[0, 0, 0, 0] += 4.0
    assert trajectory_error(a, b) == pytest.approx(16 / 8)


def gallery(folder, config, raw=True):
    return Gallery(folder, World(CPU), config.seed, 64, chunk=32, raw=raw)


def test_every_network_starts_from_the_same_noise_and_finer_grids_come_closer(tmp_path):
    config = make_config(tiny(), "x")
    images, teacher = gallery(tmp_path, config), base(config)
    finest = images.images(teacher, HERE, "ddim", 256, NUM_IMAGES)
    errors = [
        trajectory_error(images.images(teacher, HERE, "ddim", n, NUM_IMAGES), finest)
        for n in (2, 8, 32, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
    assert finest.shape == (NUM_IMAGES, 1, 32, 32)
    assert finest.dtype == torch.float32
    assert finest.abs().max() > 1, "not clipped"


def test_images_are_kept_and_not_made_twice(tmp_path, monkeypatch):
    config = make_config(tiny(), "x")
    teacher = base(config)
    first = gallery(tmp_path, config).images(teacher, HERE, "ddim", 2, 40)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sampling.SampleRequest.sample", lambda *_: pytest.fail("twice"))
        again = gallery(tmp_path, config).images(teacher, HERE, "ddim", 2, 40)
        assert torch.equal(again, first)
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(gallery(tmp_path, config).images(teacher, HERE, "ddim", 2, 40), first)


def test_raw_images_are_no_others_and_more_of_them_begin_alike(tmp_path):
    config = make_config(tiny(sampling={"clip": False}), "x")
    teacher = base(config)
    few = gallery(tmp_path / "a", config).images(teacher, HERE, "ddim", 2, 33)
    many = gallery(tmp_path / "b", config).images(teacher, HERE, "ddim", 2, 70)
    assert (len(few), len(many)) == (33, 70)
    torch.testing.assert_close(many[:33], few)
    rounded = gallery(tmp_path / "a", config, raw=False).images(teacher, HERE, "ddim", 2, 33)
    assert torch.equal(rounded, decode(few))


@pytest.mark.usefixtures("layout")
def test_the_report_says_what_was_measured(tmp_path):
    rows = [LadderRow(2, 10, 0.25, 1.0), LadderRow(1, 20, 0.5, 0.0)]
    table = ladder_table(rows, 4)
    assert "| 2 | 10 | 0.250000 | 1.000000 | 0.25 |" in table
    assert "4-step DDIM" in table
    images = {n: torch.zeros(64, 3, 8, 8) for n in (4, 2, 1)}
    write_table(tmp_path, "x", rows, 4, table)
    assert "first teacher's 4-step DDIM" in ladder_table(rows, 4, "ddim")
    assert "first teacher's 4-step consistency" in ladder_table(rows, 4, "consistency")
    draw_pictures(tmp_path, images, images, 4)
    assert table in (tmp_path / "ladder.md").read_text()
    numbers = json.loads((tmp_path / "ladder.json").read_text())
    assert numbers["rows"][0] == {
        "num_steps": 2,
        "updates": 10,
        "student_error": 0.25,
        "teacher_error": 1.0,
    }
    for name in ("comparison.png", "ladder.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 1000
            grey = (np.asarray(picture.convert("L")) == 128).mean()
        assert grey > 0.4, "the images, all of them zero, are there"
