"""ONNX files give what PyTorch gives, and only those of this project are read."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint, progressive_student, save_checkpoint
from pipeline.config import make_config
from pipeline.network import build_network
from pipeline.sampling import SampleRequest
from tests.models.test_unet import awake
from tests.processes import run_alone
from tests.toys import tiny
from tools import export_onnx, onnx_file
from tools.onnx_file import read_onnx
from utils.command import InputError
from utils.processes import World
from utils.randomness import ImageNoise

onnx = pytest.importorskip("onnx", reason="exports to ONNX")
pytest.importorskip("onnxruntime", reason="runs ONNX files")
pytest.importorskip("onnxscript", reason="exports to ONNX")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def student(path, num_steps, clip=False, **model):
    """A student with random weights that are nowhere zero."""
    values = tiny(diffusion={"clip": clip})
    values["model"] |= model
    config = make_config(values, "x")
    torch.manual_seed(0)
    network = awake(build_network(config, CPU))
    kind = progressive_student(config, num_steps)
    weights = network.state_dict()
    save_checkpoint(path, Checkpoint("student", "tiny", config, 1, 1, weights, **kind))
    return path


def trace_once():
    """Tracing takes seconds; the files of one model in several precisions begin with the same."""
    trace, known = onnx_file.all_steps, {}

    def once(denoiser, conditions, shape, clip, levels):
        key = (*conditions, *levels.tolist())
        if key not in known:
            known[key] = trace(denoiser, conditions, shape, clip, levels)
        return copy.deepcopy(known[key])

    onnx_file.all_steps = once


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoints, and their exports by name."""
    folder = tmp_path_factory.mktemp("onnx")
    plain = student(folder / "plain.pt", 4)
    guided = student(folder / "guided.pt", 2, clip=True, num_classes=10, guidance=True)
    exports = {
        "plain": [plain],
        "fp16": [plain, "--precision", "fp16"],
        "int8": [plain, "--precision", "int8"],
        "guided": [guided],
        "one step": [guided, "--one_step"],
    }
    found = {name: folder / f"{name}.onnx" for name in exports}
    commands = [[*map(str, a), "--output", str(found[n])] for n, a in exports.items()]
    run_alone("tools.export_onnx", *commands, before=trace_once)
    return found | {"plain.pt": plain, "guided.pt": guided}


def drawn(path, count, **given):
    """The noise of the first images of a checkpoint, and the images that PyTorch makes of it."""
    checkpoint = load_checkpoint(path)
    request = SampleRequest.of(
        checkpoint, load_denoiser(checkpoint, path, CPU), World(CPU), **given
    )
    noise = ImageNoise(request.seed, range(count), image_shape(checkpoint.config), CPU)
    return noise.draw(), request.draw(range(count))


def share_that_differs(a, b):
    return (a.int() - b.int()).abs().gt(1).float().mean().item()


@pytest.mark.parametrize("count", [1, 3, 64])
def test_a_graph_of_all_steps_draws_the_same_images(files, count):
    noise, images = drawn(files["plain.pt"], count)
    (made,) = read_onnx(files["plain"])(noise=noise)
    assert made.shape == images.shape
    assert made.dtype == torch.uint8
    assert share_that_differs(made, images) == 0
    assert (made != images).float().mean() < 0.002
    assert share_that_differs(made.flip(-1), images) > 0.1, "the test can fail"


def test_labels_and_guidance_are_inputs(files):
    noise, images = drawn(files["guided.pt"], 10, guidance=2.0)
    model = read_onnx(files["guided"])
    label = torch.arange(10)
    (made,) = model(noise=noise, label=label, guidance=torch.full((10,), 2.0))
    assert share_that_differs(made, images) == 0
    (other,) = model(noise=noise, label=label.flip(0), guidance=torch.full((10,), 2.0))
    (unguided,) = model(noise=noise, label=label, guidance=torch.zeros(10))
    assert share_that_differs(other, images) > 0.01
    assert share_that_differs(unguided, images) > 0.01


def test_one_step_is_the_denoiser_in_its_range(files):
    checkpoint = load_checkpoint(files["guided.pt"])
    denoise = load_denoiser(checkpoint, files["guided.pt"], CPU)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(64, *image_shape(checkpoint.config), generator=rng)
    logsnr = torch.linspace(-5, 5, 64)
    named = {"label": torch.arange(64) % 11 - 1, "guidance": torch.linspace(0, 4, 64)}
    expected = denoise(z, logsnr, **named)
    x, eps = read_onnx(files["one step"])(z=z, logsnr=logsnr, **named)
    for ours, theirs in ((x, expected.x), (eps, expected.eps)):
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())
    assert x.abs().max() == 1, "diffusion.clip"


def test_smaller_weights_make_smaller_files_and_nearly_the_same_images(files):
    noise, images = drawn(files["plain.pt"], 16)
    sizes = {name: files[name].stat().st_size for name in ("plain", "fp16")}
    weights = sum(t.numel() for t in load_checkpoint(files["plain.pt"]).weights.values())
    assert sizes["fp16"] < sizes["plain"] - 1.8 * weights, (
        "two of four bytes, but for small tensors"
    )
    for name, most in (("fp16", 2.0), ("int8", 60.0)):
        (made,) = read_onnx(files[name])(noise=noise)
        difference = (made.float() - images.float()).abs().mean().item()
        assert 0 < difference < most


def test_the_metadata_has_grid_and_config(files):
    about, checkpoint = read_onnx(files["plain"]).about, load_checkpoint(files["plain.pt"])
    assert about["grid"] == pytest.approx(list(checkpoint.grid[:-1]))
    assert make_config(about["config"], "x") == checkpoint.config
    assert (about["graph"], about["precision"]) == ("sampler", "fp32")


def test_other_files_are_refused_in_one_line(files, tmp_path):
    content = files["plain"].read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(content[: len(content) // 2])
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    model = onnx.load(files["plain"])
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    for path, reason in (
        (cut, "not a readable ONNX model"),
        (text, "not a readable ONNX model"),
        (foreign, "not written by tools/export_onnx.py"),
        (tmp_path / "missing.onnx", "no such file"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            read_onnx(path)
        assert "\n" not in str(error.value)


def test_weights_too_large_for_half_precision_are_refused():
    large = onnx.numpy_helper.from_array(np.full(256, 7e4, np.float32), "large")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [large]))
    with pytest.raises(InputError, match=r"x\.pt: large: too large for float16"):
        onnx_file.halve(model, Path("x.pt"))


def test_what_cannot_be_exported_is_refused(files, tmp_path, capsys):
    plain = str(files["plain.pt"])
    many = student(tmp_path / "many.pt", 32)
    config = make_config(tiny(sampling={"sampler": "ancestral"}), "x")
    noisy = tmp_path / "noisy.pt"
    weights = build_network(config, CPU).state_dict()
    save_checkpoint(noisy, Checkpoint("base", "tiny", config, 1, 0, weights))
    for arguments, reason in (
        ([plain, "--output", "x.pt"], "ends in .onnx"),
        ([str(many), "--output", str(tmp_path / "x.onnx")], "at most 16"),
        ([str(noisy), "--output", str(tmp_path / "x.onnx")], "its sampler is ancestral"),
        ([str(many), "--output", str(tmp_path / "x.onnx"), "--steps", "8"], "was distilled for 32"),
    ):
        assert export_onnx.main(arguments) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()
