"""Latent diffusion through the command line: an autoencoder, a base model, students, samples."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import distill
import evaluate
import sample
import train
from benchmarks.timing import timed_stages
from evaluation.gallery import RealImages, real_images
from pipeline.checkpoint import digest, load_checkpoint
from pipeline.codec import open_codec
from pipeline.data import open_dataset
from tests.commands import run
from tests.processes import run_together
from tests.test_methods import Killed, Steps, refused
from tests.toys import tiny
from tools import export_diffusers, train_autoencoder
from training.ladder import distillation_config

pytest.importorskip("diffusers", reason="autoencoders are AutoencoderKL of diffusers")

from pipeline.autoencoder_file import read_autoencoder

ROOT = Path(__file__).parents[1]
FILE = "autoencoder.safetensors"


def write_configs(folder, file):
    """ae.yaml: of an autoencoder; latent.yaml: of a model on its latents."""
    values = tiny(autoencoder={"channels": [8, 8, 8], "latent_channels": 2})
    values["data"] = {"horizontal_flip": True}
    (folder / "ae.yaml").write_text(yaml.safe_dump(values))
    del values["autoencoder"]
    values["codec"] = {"name": "autoencoder", "file": str(file)}
    values["model"] |= {"patch_size": 1}
    values["sampling"] = {"steps": 8, "grid": 2, "clip": False}
    (folder / "latent.yaml").write_text(yaml.safe_dump(values))
    return folder / "ae.yaml", folder / "latent.yaml"


@pytest.fixture(scope="module", autouse=True)
def _no_more_than_the_method():
    """MNIST is read once, few images are compared, no loss is drawn; other tests look at those."""

    def few(config):
        real = real_images(config)
        return RealImages(real.reference[:200], real.floor[:200], real.training[:300])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.build.open_dataset", cache(open_dataset))
        patch.setattr("evaluation.curves.draw_loss_curve", lambda folder: None)
        patch.setattr("evaluation.report.NUM_IMAGES", 2)
        patch.setattr("evaluation.report.CHUNK", 2)
        patch.setattr("pipeline.latents.MEASURED", 64)
        patch.setattr("evaluation.gallery.real_images", few)
        yield


@pytest.fixture(autouse=True)
def _files_are_read_again():
    open_codec.cache_clear()


def make(folder, file=None, kills=None, monkeypatch=None):
    """Trains an autoencoder, a base model and two students in the folder; returns their steps.

    file: of the autoencoder, if not the one made here. kills: after so many updates of each script
    it is killed, and the same command is run again.
    """
    ae, latent = write_configs(folder, file or folder / "ae" / FILE)
    teacher = ("--teacher_model_checkpoint", folder / "base/diffusion-4.pt")
    commands = (
        (train_autoencoder, "--config_path", ae, "--output", folder / "ae"),
        (train, "--config_path", latent, "--output", folder / "base"),
        (distill, "--config_path", latent, *teacher, "--output", folder / "ladder"),
    )
    steps = []
    for (script, *arguments), kill_at in zip(commands, kills or (None,) * 3, strict=True):
        if kill_at is not None:
            with monkeypatch.context() as patch:
                steps.append(Steps(patch, kill_at))
                with pytest.raises(Killed):
                    run(script, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            steps.append(Steps(patch))
            assert run(script, *arguments) == 0
    return steps


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    return folder, make(folder)


WEIGHTS = ("ae/autoencoder-4.pt", "base/diffusion-4.pt", "ladder/student-4.pt")
WEIGHTS += ("ladder/student-2.pt",)


def load(path):
    return load_checkpoint(path, path.stem.startswith("autoencoder"))


def test_the_chain_is_in_latent_space(made):
    folder, _ = made
    stored = read_autoencoder(folder / "ae" / FILE)
    averaged = load(folder / WEIGHTS[0]).ema
    assert digest(stored.weights) == digest({k[3:]: v for k, v in averaged.items()})
    for name in WEIGHTS[1:]:
        checkpoint = load(folder / name)
        codec = checkpoint.config.codec
        assert (codec.digest, codec.latent_channels) == (stored.digest, 2)
        assert (codec.downsampling, codec.file) == (4, str(folder / "ae" / FILE))
        assert checkpoint.weights["conv_in.weight"].shape[1] == 2
    table = (folder / "ladder/ladder.md").read_text()
    assert "DDIM latents from the same noise (2 latents, not clipped)" in table
    for picture in ("base/diffusion-4.png", "ladder/student-2.png", "ladder/comparison.png"):
        assert (folder / picture).exists()
    entries = [json.loads(line) for line in (folder / "ae/metrics.jsonl").read_text().splitlines()]
    assert {entry["kind"] for entry in entries} == {"autoencoder"}


def test_a_killed_chain_goes_on_as_if_nothing_had_happened(made, tmp_path, monkeypatch):
    """Bit-identical: every update done again, averages and optimiser, and every file."""
    folder, (ae, base, ladder) = made
    killed = make(tmp_path, kills=(3, 3, 5), monkeypatch=monkeypatch)
    for undisturbed, one, two in zip((ae, base, ladder), killed[::2], killed[1::2], strict=True):
        assert len(two.digests) < len(undisturbed.digests)
        assert one.digests.items() <= undisturbed.digests.items()
        assert two.digests.items() <= undisturbed.digests.items()
    assert (tmp_path / "ae" / FILE).read_bytes() == (folder / "ae" / FILE).read_bytes()
    for name in WEIGHTS:
        first, second = load(folder / name), load(tmp_path / name)
        for entry in ("model", "ema", "optimizer", "grid", "lineage", "update"):
            assert digest(getattr(first, entry)) == digest(getattr(second, entry)), name
        first, second = ((f / name).with_suffix(".png") for f in (folder, tmp_path))
        assert first.read_bytes() == second.read_bytes()


def test_an_update_of_latents_can_be_timed(made):
    folder, _ = made
    base = load(folder / WEIGHTS[1])
    config = distillation_config(base, folder / WEIGHTS[1], None, [])
    for teacher in (None, base):
        stages = timed_stages(config, teacher, 0.01)
        assert all(stage["seconds"] > 0 for stage in stages)
        assert [stage["num_steps"] for stage in stages] == ([None] if teacher is None else [4, 2])


def test_samples_are_decoded(made, tmp_path):
    folder, _ = made
    student = ("--checkpoint", folder / WEIGHTS[-1], "--output")
    assert run(sample, *student, tmp_path / "x.npz", "--count", 3) == 0
    images = np.load(tmp_path / "x.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((3, 32, 32, 1), np.uint8)
    assert run(sample, *student, tmp_path / "x.png", "--trajectory") == 0
    assert (tmp_path / "x-strip.png").exists()
    both = [folder / name for name in (WEIGHTS[1], WEIGHTS[-1])]
    out = tmp_path / "evaluation"
    assert run(evaluate, "--checkpoint", *both, "--count", 20, "--output", out) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    (row,) = (row for row in rows if row["kind"] == "student")
    assert row["to_base"] is not None, "it has its base model beside it"


def test_what_latents_cannot_do_is_refused(made, tmp_path, capsys):
    folder, _ = made
    student, config = folder / WEIGHTS[-1], folder / "latent.yaml"
    line = refused(capsys, sample, "--checkpoint", student, "--clip")
    assert "--clip: latents have no fixed range" in line
    out = ("--output", tmp_path / "out")
    line = refused(capsys, train, "--config_path", config, *out, "--set", "sampling.clip=true")
    assert "sampling.clip: true, but latents have no fixed range" in line
    line = refused(capsys, sample, "--checkpoint", folder / WEIGHTS[0])
    assert "autoencoder-4.pt: kind: autoencoder, where that of a diffusion model" in line
    line = refused(capsys, export_diffusers, student, *out)
    assert "codec.name: autoencoder; models of pixels can be exported" in line
    line = refused(capsys, train_autoencoder, "--config_path", config, *out)
    assert "codec: an autoencoder is trained on pixels" in line
    ae = ("--config_path", folder / "ae.yaml")
    line = refused(capsys, train_autoencoder, *ae, *out, "--set", "data.image_size=30")
    assert "data.image_size: 30" in line
    line = refused(capsys, train_autoencoder, *ae, "--output", folder / "base")
    assert "base: holds the training of a base model" in line
    line = refused(capsys, train, "--config_path", config, "--output", folder / "ae")
    assert "ae: holds the training of an autoencoder" in line
    assert not (tmp_path / "out").exists()


def test_the_autoencoder_must_be_the_one_of_the_training(made, tmp_path, capsys):
    folder, _ = made
    base = tmp_path / "base" / "diffusion-4.pt"
    base.parent.mkdir()
    base.write_bytes((folder / WEIGHTS[1]).read_bytes())
    _, config = write_configs(tmp_path, folder / "ae" / FILE)
    other = tmp_path / "other" / FILE
    few = ("--set", "seed=1", "training.updates=1", "training.batch_size=2")
    command = ("--config_path", folder / "ae.yaml", "--output", other.parent, *few)
    assert run(train_autoencoder, *command) == 0
    command = ("--config_path", config, "--teacher_model_checkpoint", base)
    command += ("--output", tmp_path / "ladder", "--set")
    line = refused(capsys, distill, *command, f"codec.file={other}")
    assert f"{other}: codec.file: not the autoencoder that the model was trained with" in line
    line = refused(capsys, distill, *command, f"codec.file={tmp_path / 'missing'}")
    assert f"{tmp_path / 'missing'}: no such autoencoder" in line
    new = ("--config_path", config, "--output", tmp_path / "new", "--set")
    line = refused(capsys, train, *new, f"codec.file={tmp_path / 'missing'}")
    assert "no such file; train an autoencoder first (python -m tools.train_autoencoder" in line
    line = refused(
        capsys,
        train,
        "--config_path",
        config,
        "--output",
        folder / "base",
        "--set",
        f"codec.file={other}",
    )
    assert "of a run with another codec.digest" in line
    initial = ("--initialise", base, "--output", tmp_path / "new")
    line = refused(capsys, train, "--config_path", config, *initial, "--set", f"codec.file={other}")
    assert "codec.digest is" in line


def test_the_file_may_lie_beside_the_checkpoint(made, tmp_path, capsys):
    folder, _ = made
    hidden = folder / "hidden"
    (folder / "ae" / FILE).rename(hidden)
    try:
        student = tmp_path / "student-2.pt"
        student.write_bytes((folder / WEIGHTS[-1]).read_bytes())
        draw = ("--checkpoint", student, "--count", 2, "--output", tmp_path / "x.npz")
        assert f"{FILE}: no such autoencoder" in refused(capsys, sample, *draw)
        (tmp_path / FILE).write_bytes(hidden.read_bytes())
        assert run(sample, *draw) == 0
    finally:
        hidden.rename(folder / "ae" / FILE)


def test_a_folder_of_diffusers_becomes_a_file_of_the_run(made, tmp_path, capsys):
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=2,
    ).save_pretrained(tmp_path / "kl")
    _, config = write_configs(tmp_path, tmp_path / "kl")
    command = ("--config_path", config, "--output", tmp_path / "base")
    assert run(train, *command, "--set", "training.updates=2") == 0
    stored = tmp_path / "base" / "codec.safetensors"
    content = stored.read_bytes()
    assert run(train, *command) == 0
    assert stored.read_bytes() == content
    base = load(tmp_path / "base/diffusion-4.pt")
    assert base.config.codec.file == str(stored)
    assert base.config.codec.digest == read_autoencoder(stored).digest
    teacher = ("--teacher_model_checkpoint", tmp_path / "base/diffusion-4.pt")
    ladder = ("--config_path", config, *teacher, "--output", tmp_path / "ladder")
    assert run(distill, *ladder) == 0
    line = refused(capsys, distill, *ladder, "--set", f"codec.file={tmp_path / 'kl'}")
    assert "codec.file: a folder, but the model was trained with a file" in line


def test_two_processes_train_what_one_trains(made, tmp_path):
    folder, _ = made
    ae, latent = write_configs(tmp_path, folder / "ae" / FILE)
    for script, config, last in (
        ("tools.train_autoencoder", ae, WEIGHTS[0]),
        ("train", latent, WEIGHTS[1]),
    ):
        output = (tmp_path / last).parent
        run_together(2, script, "--config_path", config, "--output", output)
        # Adam divides by the gradient's size: a weight without influence, as a bias before a norm
        # of its own channel, follows the rounding. The losses do not.
        one, two = (losses((f / last).parent / "metrics.jsonl") for f in (folder, tmp_path))
        assert len(one) == 4
        assert two == pytest.approx(one, rel=1e-4)


def losses(path):
    entries = map(json.loads, path.read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]
