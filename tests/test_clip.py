"""diffusion.clip, through the scripts: x_hat is in [-1, 1] in training, targets and samples."""

import numpy as np
import pytest
import torch

import distill
import sample
import train
from pipeline.build import load_denoiser
from pipeline.checkpoint import load_checkpoint
from tests.commands import refused, run, write_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model and its students of 4 and 2 steps."""
    folder = tmp_path_factory.mktemp("clip")
    config = write_config(folder, diffusion={"clip": True})
    assert run(train, "--config_path", config, "--output", folder / "base") == 0
    base = folder / "base" / "diffusion-4.pt"
    ladder = ("--set", "distillation.ladder=[8,4,2]", "--output", folder / "ladder")
    assert run(distill, "--teacher_model_checkpoint", base, *ladder) == 0
    return [base, *(folder / "ladder" / f"student-{n}.pt" for n in (4, 2))]


def test_base_model_and_students_are_in_range(files):
    z, logsnr = 5 * torch.randn(8, 1, 32, 32), torch.linspace(-20, 20, 8)
    for path in files:
        checkpoint = load_checkpoint(path)
        assert checkpoint.config.diffusion.clip
        prediction = load_denoiser(checkpoint, path, CPU)(z, logsnr)
        assert prediction.x.abs().max() == 1


def test_samplers_need_not_clip_again(files, tmp_path, capsys):
    drawn = []
    for option in ("--clip", "--no-clip"):
        out = tmp_path / f"{option}.npz"
        given = ("--checkpoint", files[-1], "--count", 4, option, "--output", out)
        assert run(sample, *given) == 0
        drawn.append(np.load(out)["arr_0"])
        assert ("--no-clip: changes nothing" in capsys.readouterr().err) == (option == "--no-clip")
    assert np.array_equal(*drawn)


def test_a_run_goes_on_only_with_the_same_value(files, tmp_path, capsys):
    config = write_config(tmp_path)
    again = ("--config_path", config, "--output", files[0].parent, "--set", "training.updates=6")
    assert "diffusion.clip" in refused(capsys, train, *again)
