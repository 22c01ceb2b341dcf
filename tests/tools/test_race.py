"""tools/race.py: an animation of models that draw from the same noise."""

import numpy as np
import pytest
import yaml
from PIL import Image

import distill
import train
from pipeline.api import load_sampler
from tests.toys import tiny
from tools import race


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    assert train.main(["--config_path", str(config), "--output", str(folder / "base")]) == 0
    teacher = folder / "base" / "diffusion-4.pt"
    ladder = ["--output", str(folder / "ladder"), "--set", "distillation.ladder=[4,2]"]
    assert distill.main(["--teacher_model_checkpoint", str(teacher), *ladder]) == 0
    return teacher, folder / "ladder" / "student-2.pt"


def pictures(frame, row, count):
    """The images of a row of a frame, (count, 32, 32)."""
    height, scale = 32, race.SCALE
    top = row * (height + 2) * scale
    part = frame[top : top + height * scale : scale, race.LABEL :: scale]
    return np.stack([part[:, n * 34 : n * 34 + 32] for n in range(count)])


def test_every_frame_is_a_call_of_each_network(models, tmp_path):
    file = tmp_path / "race.gif"
    given = ["--checkpoint", *map(str, models), "--steps", "5", "--count", "3", "--seed", "7"]
    assert race.main([*given, "--output", str(file)]) == 0
    with Image.open(file) as animation:
        assert animation.n_frames == 6
        frames = []
        for n in range(6):
            animation.seek(n)
            frames.append(np.asarray(animation.convert("L")).astype(int))
    first, second = (pictures(frames[0], row, 3) for row in (0, 1))
    assert np.array_equal(first, second), "the same noise"
    assert not np.array_equal(pictures(frames[0], 1, 3), pictures(frames[2], 1, 3))
    for n in (3, 4, 5):  # the student is done after two calls
        assert np.array_equal(pictures(frames[n], 1, 3), pictures(frames[2], 1, 3))
        assert not np.array_equal(pictures(frames[n], 0, 3), pictures(frames[n - 1], 0, 3))
    for row, (path, steps) in enumerate(zip(models, (5, 2), strict=True)):
        made = load_sampler(path, steps=steps)(3, seed=7)[:, 0].numpy()
        assert np.abs(pictures(frames[5], row, 3) - made).max() <= 2, "GIFs have few colours"


def test_models_of_other_sizes_are_refused(models, tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(tiny(data={"image_size": 16}, training={"updates": 1})))
    assert train.main(["--config_path", str(config), "--output", str(tmp_path / "small")]) == 0
    small = str(tmp_path / "small" / "diffusion-1.pt")
    given = ["--checkpoint", small, str(models[1]), "--steps", "2", "--count", "1"]
    assert race.main([*given, "--output", str(tmp_path / "race.gif")]) == 2
    assert "images of different sizes" in capsys.readouterr().err


def test_other_names_are_refused(models, tmp_path, capsys):
    given = ["--checkpoint", str(models[0]), "--output", str(tmp_path / "race.png")]
    assert race.main(given) == 2
    assert "give a name that ends in .gif" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
