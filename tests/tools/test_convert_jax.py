"""The original's checkpoints, read without JAX: values, every way they are written, and damage."""

import copy
import os
import pickle
from math import inf

import msgpack
import numpy as np
import pytest
import torch
import yaml

import sample
from pipeline.build import build_network
from pipeline.checkpoint import load_checkpoint
from tests.toys import GOLDEN, golden
from tools import convert_jax
from utils.command import InputError

CPU = torch.device("cpu")
CONFIG = {
    "data": {"name": "cifar10", "image_size": 16, "channels": 3},
    "model": {
        "channels": 32,
        "embedding_channels": 128,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [8],
        "attention_heads": 2,
        "dropout": 0.0,
        "resample": "conv",
        "num_classes": 10,
    },
    "diffusion": {"prediction": "v"},
    "sampling": {"grid": 4},
}


def array(values, code=convert_jax.ARRAY, dtype=None):
    """An array as flax packs it."""
    values = np.asarray(values)
    packed = msgpack.packb((values.shape, dtype or values.dtype.name, values.tobytes("C")))
    return msgpack.ExtType(code, packed)


def packed(value):
    """Nested dicts with tensors as flax would write them."""
    if isinstance(value, dict):
        return {key: packed(entry) for key, entry in value.items()}
    return array(value.numpy()) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def content():
    return convert_jax.read_msgpack(GOLDEN / "checkpoint.msgpack")


@pytest.fixture
def run(tmp_path, capsys):
    """Converts a file and gives the one line said where that fails, else the output's path."""
    config = tmp_path / "reference.yaml"
    config.write_text(yaml.safe_dump(CONFIG))

    def convert(data, *more):
        path, output = tmp_path / "x.msgpack", tmp_path / "x.safetensors"
        path.write_bytes(data)
        arguments = [str(path), "--config_path", str(config), "--output", str(output), *more]
        capsys.readouterr()
        if convert_jax.main(arguments) == 0:
            return output
        assert not output.exists()
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return convert


def output_of(path, dtype):
    checkpoint = load_checkpoint(path)
    network = build_network(checkpoint.config, CPU).eval()
    network.load_state_dict(checkpoint.weights)
    x, logsnr, label = (golden("unet_B_io.npz")[key] for key in ("x", "logsnr", "y"))
    with torch.no_grad():
        return network.to(dtype)(x.to(dtype), logsnr.to(dtype), label).double()


def test_the_reference_checkpoint_gives_the_reference_outputs(run, capsys):
    path = run((GOLDEN / "checkpoint.msgpack").read_bytes())
    assert "a student of 4 steps" in capsys.readouterr().out
    expected = golden("unet_B_io.npz")["out"]
    torch.testing.assert_close(output_of(path, torch.float64), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output_of(path, torch.float32), expected, rtol=0, atol=3e-6)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.update, checkpoint.num_steps) == (1234, 4)


def test_a_converted_checkpoint_is_sampled_from(run, tmp_path, capsys):
    path = run((GOLDEN / "checkpoint.msgpack").read_bytes())
    picture = tmp_path / "x.png"
    assert sample.main(["--checkpoint", str(path), "--labels", "3", "--output", str(picture)]) == 0
    assert "4 steps of ddim" in capsys.readouterr().out
    assert picture.exists()


def rewritten(content, change):
    """The reference checkpoint's bytes after a change of its content."""
    content = copy.deepcopy(content)
    change(content)
    return msgpack.packb(packed(content))


def test_every_way_of_writing_is_read(run, content):
    """Old GroupNorm shapes, arrays in chunks, numpy scalars, a base model without steps."""

    def change(content):
        norm = content["ema_params"]["norm_out"]
        norm["scale"] = norm["scale"].reshape(1, 1, 1, -1)
        kernel = content["ema_params"]["dense1"]["kernel"]
        parts = kernel.flatten().split(1000)
        content["ema_params"]["dense1"]["kernel"] = {
            "__msgpack_chunked_array__": True,
            "shape": {str(n): size for n, size in enumerate(kernel.shape)},
            "chunks": {str(n): part for n, part in enumerate(parts)},
        }
        content["num_sample_steps"] = None
        content["step"] = array(np.int32(77), convert_jax.SCALAR)
        content["optimizer"] = {"count": array(np.array(5, np.int32))}

    path = run(rewritten(content, change))
    expected = golden("unet_B_io.npz")["out"]
    torch.testing.assert_close(output_of(path, torch.float64), expected, rtol=0, atol=1e-10)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.kind, checkpoint.update, checkpoint.num_steps) == ("base", 77, None)


def test_half_precision_is_read(tmp_path):
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    data = array(values.view(torch.uint16).numpy(), dtype="bfloat16")
    (tmp_path / "x").write_bytes(msgpack.packb({"a": data}))
    assert torch.equal(convert_jax.read_msgpack(tmp_path / "x")["a"], values)


def without(key):
    return lambda content: content["ema_params"].pop(key)


def renamed(content):
    content["ema_params"]["side_0.block_0"] = content["ema_params"].pop("down_0.block_0")


def doubled(content):
    content["ema_params"]["down_0.block_1"] = content["ema_params"]["down_0.block_0"]


def transposed(content):
    p = content["ema_params"]["conv_in"]
    p["kernel"] = p["kernel"].permute(1, 0, 3, 2).contiguous()


def gutted(content):
    content["ema_params"]["mid.attn_1"].pop("q")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (without("mid.block_1"), "10 missing: middle_in.norm1.weight, "),
        (doubled, "left over: down.0.blocks.1.norm1.weight"),
        (transposed, "of another shape: conv_in.weight (3, 32, 3, 3), not (32, 3, 3, 3)"),
        (renamed, "its 'side_0.block_0' is not a part of the paper's network"),
        (gutted, "its 'mid.attn_1' is not a part of the paper's network as it should be"),
        (lambda content: content.pop("ema_params"), "has no ema_params"),
    ],
)
def test_what_does_not_fit_is_named(run, content, change, hint):
    line = run(rewritten(content, change))
    assert line.startswith("error: ")
    assert hint in line


def test_another_config_is_named(run):
    data = (GOLDEN / "checkpoint.msgpack").read_bytes()
    assert "of another shape" in run(data, "--set", "model.channels=64")
    assert "left over" in run(data, "--set", "model.num_classes=null")
    assert "diffusion.schedule: table" in run(data, "--set", "diffusion.schedule=table")


def test_arrays_of_no_dimension_are_numbers(run, content):
    def change(content):
        content["num_sample_steps"] = array(np.array(8, np.int32))

    path = run(rewritten(content, change))
    assert load_checkpoint(path).num_steps == 8
    path.unlink()

    for value in ("four", 2**20 + 1, -1):

        def change_to_other(content, value=value):
            content["num_sample_steps"] = value

        line = run(rewritten(content, change_to_other))
        assert "num_sample_steps is no whole number up to 1048576" in line


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "truncated, or no msgpack file"),
        (pickle.dumps(Hostile()), "x.msgpack: "),
        (msgpack.packb([1, 2]), "not a checkpoint of the paper"),
        (msgpack.packb({"a": msgpack.ExtType(7, b"x")}), "unknown type 7"),
        (msgpack.packb({"a": array([1.0], dtype="object")}), "array of 'object'"),
        (msgpack.packb({"a": array([1.0], dtype="float32")}), "not that of its 8 bytes"),
        (
            msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((-1, -1), "uint8", b"x")))}),
            "not that of its 1 bytes",
        ),
        (
            msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((inf,), "uint8", b"x")))}),
            "truncated, or no msgpack file",
        ),
        (
            msgpack.packb(
                {
                    "__msgpack_chunked_array__": True,
                    "shape": {"0": inf},
                    "chunks": {"0": array([1.0], dtype="float64")},
                }
            ),
            "in chunks that do not fit",
        ),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "in chunks that do not fit"),
        (b"\x81" * 5000, "truncated, or no msgpack file"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(run, capsys, data, hint):
    line = run(data)
    assert line.startswith("error: ")
    assert hint in line
    assert "executed" not in line


def test_truncated_files_are_one_line(run):
    whole = (GOLDEN / "checkpoint.msgpack").read_bytes()
    for share in (0.1, 0.5, 0.99):
        assert "truncated, or no msgpack file" in run(whole[: int(len(whole) * share)])


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.msgpack")
    with pytest.raises(InputError, match=r"a\.msgpack: not a regular file"):
        convert_jax.read_msgpack(tmp_path / "a.msgpack")
