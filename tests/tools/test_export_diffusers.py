"""The diffusers folder: its network, its samples and its README's code give what ours give."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from models.networks import NETWORKS
from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import make_config
from pipeline.network import build_network, build_schedule
from pipeline.sampling import SampleRequest
from tools import export_diffusers
from tools.diffusers_unet import NAMES
from utils.processes import World
from utils.randomness import ImageNoise, generator

diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WORLD = World(CPU)
STEPS = 4
MODEL = {
    "channels": 32,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [4],
    "dropout": 0.1,
    "resample": "conv",
}


def checkpoint_of(model, steps=STEPS, sampler="ddim", data=None, warp=1.3, **sections):
    """A checkpoint with random weights, none of them zero: a student, or a base model of None.

    warp: 1 for a uniform grid; otherwise one recomputed from the steps alone would be noticed.
    """
    values = {"data": {"name": "cifar10", "image_size": 8, "channels": 3} | (data or {})}
    sizes = model if "name" in model else MODEL | model
    config = make_config(values | {"model": sizes} | sections, "test")
    draw, network = generator("cpu", "export", json.dumps(model)), build_network(config, CPU)
    weights = {
        name: torch.randn(t.shape, generator=draw) / math.sqrt(t[0].numel() if t.ndim > 1 else 25)
        for name, t in network.state_dict().items()
    }
    if "conv_out.weight" in weights:
        weights["conv_out.weight"] *= 5  # so that x_hat is clipped now and then
    weights |= {name: t for name, t in network.named_buffers() if name == "table"}
    t = torch.linspace(1, 0, (steps or 1) + 1, dtype=torch.float64)[:-1] ** warp
    grid = None if steps is None else (*build_schedule(config)(t).tolist(), math.inf)
    return Checkpoint(
        kind="base" if steps is None else "student",
        name="toy",
        config=config,
        update=7,
        stage=0 if steps is None else 1,
        model=weights,
        grid=grid,
        sampler=None if steps is None else sampler,
    )


def export(folder, checkpoint, *options):
    """Saves the checkpoint, exports it, and returns diffusers' own pipeline of the folder."""
    save_checkpoint(folder / "toy.pt", checkpoint)
    arguments = [str(folder / "toy.pt"), "--output", str(folder / "out"), *options]
    assert export_diffusers.main(arguments) == 0
    return load(folder / "out")


def load(folder):
    _, info = diffusers.UNet2DModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(info.values()), info  # no weight is missing, left over or of another shape
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def largest_difference(checkpoint, unet, levels, patch_size=1, guidance=None):
    """The largest difference of the outputs over all steps and classes, and the outputs' size."""
    network = load_denoiser(checkpoint, Path("toy"), CPU).network
    classes = checkpoint.config.model.num_classes
    labels = None if classes is None else torch.tensor([0, classes - 1, -1])
    z = torch.randn(3, *image_shape(checkpoint.config), generator=generator("cpu", "z"))
    apart, sizes = [], []
    for i, logsnr in enumerate(levels[:-1].flip(0)):
        condition = {} if labels is None else {"label": labels}
        if guidance is not None:
            condition["guidance"] = torch.full((3,), guidance)
        ours = network(z, logsnr.float().expand(3), **condition)
        rows = None if labels is None else torch.where(labels < 0, classes, labels)
        with torch.no_grad():
            theirs = unet(pixel_unshuffle(z, patch_size), i, rows).sample
        apart.append((pixel_shuffle(theirs, patch_size) - ours).abs().max())
        sizes.append(ours.std())
    return torch.stack(apart).max().item(), torch.stack(sizes).max().item()  # NaN stays NaN


MODELS = {
    "conv": {},
    "block": {"resample": "block"},
    "plain": {"resample": "plain", "channel_multipliers": [1, 2, 1], "attention_head_dim": 16},
    "one level": {"channel_multipliers": [1], "attention_resolutions": []},
    "three levels, wide embedding": {
        "channel_multipliers": [1, 3, 2],
        "blocks_per_level": 2,
        "attention_resolutions": [8, 2],
        "attention_head_dim": 16,
        "embedding_channels": 48,
    },
    "block, three levels, one head": {
        "resample": "block",
        "channel_multipliers": [1, 2, 3],
        "attention_resolutions": [8, 2],
        "attention_heads": 1,
    },
    "patches": {"patch_size": 2, "attention_resolutions": [2]},
    "classes": {"num_classes": 5},
    "classes, patches, block": {"num_classes": 5, "patch_size": 2, "attention_resolutions": [2]}
    | {"resample": "block"},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_network_is_ours(model, tmp_path):
    checkpoint = checkpoint_of(model)
    unet = export(tmp_path, checkpoint).unet
    patch_size = checkpoint.config.model.patch_size
    worst, size = largest_difference(checkpoint, unet, checkpoint.levels(), patch_size)
    print(f"largest difference {worst:.1e} of outputs of size {size:.2f}")
    assert size > 0.1
    assert worst <= 1e-5


@pytest.mark.parametrize(
    "wrong", ["heads in another order", "levels upside down", "q for k", "scale for shift"]
)
def test_a_wrong_order_would_be_noticed(wrong, tmp_path):
    checkpoint = checkpoint_of({"attention_head_dim": 16})
    unet = export(tmp_path, checkpoint).unet
    with torch.no_grad():
        attention, block = unet.mid_block.attentions[0], unet.mid_block.resnets[0]
        if wrong == "heads in another order":
            order = torch.arange(64).reshape(4, 16).T.flatten()
            attention.to_out[0].weight.copy_(attention.to_out[0].weight[:, order])
        elif wrong == "levels upside down":
            unet.time_proj.weight.copy_(unet.time_proj.weight.flip(0))
        elif wrong == "q for k":
            attention.to_k.weight.copy_(attention.to_q.weight)
        else:
            projection = block.time_emb_proj
            projection.weight.copy_(projection.weight.roll(64, 0))
    worst, _ = largest_difference(checkpoint, unet, checkpoint.levels())
    print(f"{wrong}: {worst:.1e}")
    assert worst > 1e-4


def test_a_guidance_weight_is_folded_into_the_embedding(tmp_path):
    checkpoint = checkpoint_of({"num_classes": 5, "guidance": True})
    unet = export(tmp_path, checkpoint, "--guidance", "1.5").unet
    worst, size = largest_difference(checkpoint, unet, checkpoint.levels(), guidance=1.5)
    another, _ = largest_difference(checkpoint, unet, checkpoint.levels(), guidance=1.0)
    print(f"largest difference {worst:.1e} of {size:.2f}; from another weight {another:.1e}")
    assert worst <= 1e-5 < 1e-4 < another


# --- whole sampling -------------------------------------------------------------------------------


def ours(checkpoint, count, **settings):
    """Our images of seed 0, uint8."""
    denoiser = load_denoiser(checkpoint, Path("toy"), CPU)
    return SampleRequest.of(checkpoint, denoiser, WORLD, seed=0, **settings).draw_all(count)


def share_apart(a, b):
    """The share of pixels that differ, and by how many levels at most."""
    apart = (a.int() - b.int()).abs()
    print(f"{(apart > 0).float().mean():.3%} of the pixels differ, by {apart.max()} at most")
    return (apart > 0).float().mean().item(), apart.max().item()


def theirs(pipeline, count, steps, clip):
    """The images of diffusers' own pipeline from the noise of seed 0, uint8."""
    images = pipeline(
        batch_size=count,
        generator=[generator("cpu", 0, "image", n) for n in range(count)],
        num_inference_steps=steps,
        use_clipped_model_output=clip,
        output_type="pt",
    ).images
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("prediction", "clip", "logsnr_min", "steps"),
    [("v", True, -20.0, 8), ("v", False, -20.0, 8), ("x", True, -20.0, 4), ("eps", True, -4.0, 4)],
)
def test_the_pipeline_draws_our_images(prediction, clip, logsnr_min, steps, tmp_path):
    checkpoint = checkpoint_of(
        {},
        steps,
        diffusion={"prediction": prediction, "logsnr_min": logsnr_min},
        sampling={"clip": clip},
    )
    pipeline = export(tmp_path, checkpoint)
    expected = ours(checkpoint, 16)
    share, most = share_apart(theirs(pipeline, 16, steps, clip), expected)
    assert expected.float().std() > 10
    assert share <= 1e-3
    assert most <= 1
    if clip:  # the flag that README names is needed
        assert share_apart(theirs(pipeline, 16, steps, False), expected)[0] > 0.02


def test_a_base_model_is_exported_with_the_steps_asked_for(tmp_path):
    checkpoint = checkpoint_of({}, None, sampling={"steps": 12})
    for options, steps in (([], 12), (["--steps", "8"], 8)):
        pipeline = export(tmp_path, checkpoint, *options)
        assert pipeline.scheduler.config.num_train_timesteps == steps
        share, most = share_apart(
            theirs(pipeline, 8, steps, True), ours(checkpoint, 8, steps=steps)
        )
        assert share <= 1e-3
        assert most <= 1


def test_the_published_student_draws_our_digits_with_the_code_of_its_readme(tmp_path, monkeypatch):
    path = ROOT / "pretrained" / "mnist-8-steps.safetensors"
    results = ROOT / "docs" / "mnist" / "results.json"
    command = [str(path), "--output", str(tmp_path / "digits"), "--results", str(results)]
    assert export_diffusers.main(command) == 0
    card = (tmp_path / "digits" / "README.md").read_text()
    rows = [row for row in json.loads(results.read_text())["rows"] if row["name"] == path.stem]
    assert {row["quality"]["count"] for row in rows} == {2000, 5000, 10000}
    for quality in (row["quality"] for row in rows):
        assert f"| {quality['count']:,} | {quality['frechet']:.3f} ± " in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code_of(tmp_path / "digits"), names)
    z = ImageNoise(0, range(32), (1, 32, 32), CPU).draw()
    share, most = share_apart(names["sample"](z), ours(load_checkpoint(path), 32))
    assert share <= 1e-3
    assert most <= 1


def code_of(folder):
    """The code block of a folder's README."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("model", [{}, MODELS["classes, patches, block"]], ids=["plain", "loop"])
def test_the_code_of_the_readme_runs_as_it_stands(model, tmp_path):
    export(tmp_path, checkpoint_of(model))
    code = code_of(tmp_path / "out")
    assert ("class_labels" in code) == ("num_classes" in model)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    shown = code + "\nprint(len(images), type(images).__name__)"
    result = subprocess.run(
        [sys.executable, "-c", shown],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("16 Tensor\n" if model else "16 list\n")
    assert (tmp_path / "sample.png").exists() == (not model)


def test_the_labels_of_the_loop_are_ours(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(MODELS["classes, patches, block"], steps=8)
    export(tmp_path, checkpoint)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code_of(tmp_path / "out"), names)
    z = ImageNoise(0, range(6), (3, 8, 8), CPU).draw()
    drawn = names["sample"](z, torch.tensor([0, 1, 5, 0, 1, 5]))
    share, most = share_apart(drawn, ours(checkpoint, 6, labels="0,1,-1"))
    assert share <= 1e-3
    assert most <= 1
    assert share_apart(drawn, ours(checkpoint, 6, labels="1,0,-1"))[0] > 0.1


FOREIGN = {
    "name": "diffusers_unet",
    "num_train_timesteps": 24,
    "config": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
    },
}


@pytest.mark.skipif("diffusers_unet" not in NETWORKS, reason="there is no such network")
def test_a_network_that_came_from_diffusers_goes_back_with_its_whole_table(tmp_path, capsys):
    checkpoint = checkpoint_of(FOREIGN, 8, warp=1.0)
    pipeline = export(tmp_path, checkpoint)
    assert pipeline.scheduler.config.num_train_timesteps == 24
    expected = ours(checkpoint, 16)
    share, most = share_apart(theirs(pipeline, 16, 8, True), expected)
    assert expected.float().std() > 10
    assert share <= 1e-3
    assert most <= 1
    save_checkpoint(tmp_path / "toy.pt", checkpoint_of(FOREIGN, 8))
    capsys.readouterr()
    arguments = [str(tmp_path / "toy.pt"), "--output", str(tmp_path / "another")]
    assert export_diffusers.main(arguments) == 2
    assert "grid: 8 steps that are not evenly spaced in the 24 timesteps" in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "model.name: dit": (
        {"name": "dit", "channels": 16, "depth": 1, "attention_heads": 2},
        {},
    ),
    "no scheduler of diffusers reads": ({}, {"diffusion": {"prediction": "both"}}),
    "float32 betas of DDIMScheduler do not hold": ({}, {"diffusion": {"prediction": "eps"}}),
    "model.guidance: UNet2DModel does not take": ({"num_classes": 2, "guidance": True}, {}),
    "model.input_features: UNet2DModel has no": ({"input_features": [7, 8]}, {}),
    "model.channels: 48": ({"channels": 48}, {}),
    "model.channel_multipliers: 2 comes first": ({"channel_multipliers": [2, 2]}, {}),
    "model.attention_heads: 2 heads over 32 and 64": ({"attention_resolutions": [8]}, {}),
    "sampler: consistency": ({}, {"sampler": "consistency"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(said, tmp_path, capsys):
    model, settings = REFUSED[said]
    save_checkpoint(tmp_path / "toy.pt", checkpoint_of(model, **settings))
    arguments = [str(tmp_path / "toy.pt"), "--output", str(tmp_path / "out")]
    assert export_diffusers.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'toy.pt'}: " in error
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_student_of_one_step_is_the_same_for_every_sampler(tmp_path):
    """Its alpha of 4.5e-5 is 0 in the float32 betas: up to 0.02 of a level."""
    checkpoint = checkpoint_of({}, 1, "consistency")
    share, most = share_apart(
        theirs(export(tmp_path, checkpoint), 64, 1, True), ours(checkpoint, 64)
    )
    assert share <= 1e-2
    assert most <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "8"], "was distilled for 4"),
        (["--guidance", "1"], "does not take a guidance weight"),
        (["--results", "/nowhere/results.json"], "--results /nowhere/results.json: no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, tmp_path, capsys):
    save_checkpoint(tmp_path / "toy.pt", checkpoint_of({}))
    arguments = [str(tmp_path / "toy.pt"), "--output", str(tmp_path / "out"), *options]
    assert export_diffusers.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_that_is_half_replaced_is_no_pipeline(tmp_path, monkeypatch):
    export(tmp_path, checkpoint_of({}, None), "--steps", "8")
    index = next(tmp_path.rglob("model_index.json"))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.files.write_text", stopped)
    main = ["--output", str(index.parent), "--steps", "8", str(next(tmp_path.glob("*.pt")))]
    assert export_diffusers.main(main) == 130
    assert not index.exists()


def test_distances_of_other_weights_are_left_out(tmp_path, capsys):
    results = str(ROOT / "docs" / "mnist" / "results.json")
    export(tmp_path, checkpoint_of({}), "--results", results)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How good" not in card
    assert "no row measures these weights" in capsys.readouterr().err
    assert "license" not in card, "which is for the owner of the weights to say"
    assert str(tmp_path) not in card


def test_every_name_is_used():
    """A pattern that matches nothing in any network would be a mistake or a dead rule."""
    weights = checkpoint_of({"channel_multipliers": [1, 2]}).weights
    assert [p for p in NAMES if not any(re.search(p, name) for name in weights)] == []
