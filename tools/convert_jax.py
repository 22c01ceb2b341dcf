"""Converts the paper's checkpoints: python -m tools.convert_jax CHECKPOINT --config_path ..

The original (JAX, flax) writes one msgpack map {step, optimizer, ema_params, num_sample_steps}.
Reading it needs no JAX and runs no code.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.command import InputError, path_name, run_script, say
from utils.files import require_regular_file

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Convert a checkpoint of the original JAX code, with the config of its network (configs/paper/), into
a .safetensors file that sample.py, distill.py and evaluate.py take."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and converts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=path_name, help="a msgpack file of the original")
    add("--config_path", type=path_name, required=True, metavar="FILE.yaml")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--output", type=path_name, required=True, metavar="FILE.safetensors")
    return run_script(parser, argv, convert)


def convert(arguments: argparse.Namespace) -> None:
    """Reads the checkpoint, checks every name and shape, and writes it as .safetensors."""
    from models.unet_section import UNetSection
    from pipeline.checkpoint import Checkpoint, progressive_student, publish_checkpoint
    from pipeline.checkpoint_checks import require_name
    from pipeline.config import load_config
    from pipeline.network import build_schedule, misfit

    if arguments.output.suffix != ".safetensors":
        raise InputError(f"--output {arguments.output}: give a name that ends in .safetensors")
    config = load_config(arguments.config_path, arguments.set)
    require_name(arguments.config_path.stem, arguments.config_path)
    content = read_msgpack(arguments.checkpoint)
    weights = content.get("ema_params")
    if not isinstance(weights, dict):
        raise InputError(
            f"{arguments.checkpoint}: has no ema_params; not a checkpoint of the paper"
        )
    if not isinstance(config.model, UNetSection):
        raise InputError(f"{arguments.config_path}: model.name: the paper's networks are unet")
    build_schedule(config)  # raises InputError if there is none
    if config.codec.name != "pixels":
        raise InputError(f"{arguments.config_path}: codec.name: the paper's models are of pixels")
    resolutions = len(config.model.channel_multipliers)
    model = state_dict_of(weights, resolutions, arguments.checkpoint)
    if wrong := misfit(model, config):
        raise InputError(
            f"{arguments.checkpoint}: not the network of {arguments.config_path}: {wrong}"
        )
    update, steps = content.get("step"), content.get("num_sample_steps")
    for name, value, most in (("step", update, 2**31), ("num_sample_steps", steps, 2**20)):
        if not (value is None or (isinstance(value, int) and 0 <= value <= most)):
            raise InputError(f"{arguments.checkpoint}: {name} is no whole number up to {most}")
    num_steps = int(steps) if steps else None
    checkpoint = Checkpoint(
        kind="base" if num_steps is None else "student",
        name=arguments.config_path.stem,
        config=config,
        update=int(update or 0),
        stage=0 if num_steps is None else 1,
        model=model,
        **(progressive_student(config, num_steps) if num_steps else {}),
    )
    publish_checkpoint(arguments.output, checkpoint, half=False)
    made_for = "a base model" if num_steps is None else f"a student of {num_steps} steps"
    say(
        f"written: {arguments.output}: {made_for}, {sum(t.numel() for t in model.values()):,} "
        f"parameters, update {checkpoint.update}\n"
        f"next: python sample.py --checkpoint {arguments.output}"
    )


# --- msgpack as flax writes it --------------------------------------------------------------------

ARRAY, SCALAR = 1, 3  # the types of flax's msgpack extensions
DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "uint32", "uint8", "bool"}


def read_msgpack(path: Path) -> dict[str, Any]:
    """Returns the map in the file, with arrays as tensors. Raises InputError for other files."""
    import msgpack

    if path.exists():
        require_regular_file(path)
    try:
        content = msgpack.unpackb(
            path.read_bytes(), ext_hook=_extension, strict_map_key=False, raw=False
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise InputError(f"{path}: truncated, or no msgpack file ({str(error)[:60]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint of the paper")
    try:
        return _joined(content)  # type: ignore[no-any-return]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        raise InputError(f"{path}: holds an array in chunks that do not fit together") from None


def _extension(code: int, data: bytes) -> Any:
    """Returns a tensor made from (shape, dtype's name, bytes in C order), or a number."""
    import msgpack
    import numpy as np
    import torch

    if code not in (ARRAY, SCALAR):
        raise InputError(f"holds data of the unknown type {code}")
    shape, name, content = msgpack.unpackb(data)
    if name not in DTYPES:
        raise InputError(f"holds an array of {name!r}")
    sizes = [int(size) for size in shape]
    kind = np.dtype("uint16" if name == "bfloat16" else name)
    if any(size < 0 for size in sizes) or math.prod(sizes) * kind.itemsize != len(content):
        raise InputError(
            f"holds an array whose shape {sizes} is not that of its {len(content)} bytes"
        )
    tensor = torch.from_numpy(np.frombuffer(content, kind).copy()).reshape(sizes)
    if name == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return tensor if sizes else tensor.item()


def _joined(value: Any) -> Any:
    """Returns the value with the arrays joined that flax splits into chunks of a gigabyte."""
    import torch

    if not isinstance(value, dict):
        return value
    if "__msgpack_chunked_array__" not in value:
        return {key: _joined(entry) for key, entry in value.items()}
    shape, chunks = (
        [part[str(n)] for n in range(len(part))] if isinstance(part, dict) else list(part)
        for part in (value["shape"], value["chunks"])
    )
    return torch.cat([chunk.flatten() for chunk in chunks]).reshape([int(size) for size in shape])


# --- names and axes -------------------------------------------------------------------------------

State = dict[str, "Tensor"]
Parameters = Mapping[str, Any]


def _norm(name: str, p: Parameters) -> State:  # old releases have (1, 1, 1, C)
    return {f"{name}.weight": p["scale"].flatten(), f"{name}.bias": p["bias"].flatten()}


def _dense(name: str, p: Parameters) -> State:
    return {f"{name}.weight": p["kernel"].T, f"{name}.bias": p["bias"]}


def _conv(name: str, p: Parameters) -> State:
    return {f"{name}.weight": p["kernel"].permute(3, 2, 0, 1), f"{name}.bias": p["bias"]}


def _block(name: str, p: Parameters) -> State:
    state = _norm(f"{name}.norm1", p["norm1"]) | _conv(f"{name}.conv1", p["conv1"])
    state |= _dense(f"{name}.scale_shift", p["temb_proj"])
    state |= _norm(f"{name}.norm2", p["norm2"]) | _conv(f"{name}.conv2", p["conv2"])
    if "nin_shortcut" in p:
        kernel = p["nin_shortcut"]["kernel"].T[:, :, None, None]
        state |= {f"{name}.skip.weight": kernel, f"{name}.skip.bias": p["nin_shortcut"]["bias"]}
    return state


def _attention(name: str, p: Parameters) -> State:
    """Joins q, k, v of (C, heads, width) into one matrix; channel = head * width + d."""
    import torch

    weights = torch.cat([p[part]["kernel"].flatten(1).T for part in "qkv"])
    biases = torch.cat([p[part]["bias"].flatten() for part in "qkv"])
    return {
        **_norm(f"{name}.norm", p["norm"]),
        f"{name}.qkv.weight": weights,
        f"{name}.qkv.bias": biases,
        f"{name}.out.weight": p["proj_out"]["kernel"].flatten(0, 1).T,
        f"{name}.out.bias": p["proj_out"]["bias"],
    }


def _resampling(name: str, p: Parameters) -> State:
    return _block(name, p) if "norm1" in p else _conv(f"{name}.conv", p)


Part = Callable[[str, Parameters], State]
FIXED: dict[str, tuple[Part, str]] = {
    "dense0": (_dense, "time_in"),
    "dense1": (_dense, "time_out"),
    "class_emb": (_dense, "class_embedding"),
    "conv_in": (_conv, "conv_in"),
    "conv_out": (_conv, "conv_out"),
    "norm_out": (_norm, "norm_out"),
    "mid.block_1": (_block, "middle_in"),
    "mid.attn_1": (_attention, "middle_attention"),
    "mid.block_2": (_block, "middle_out"),
}


def _place_of(key: str, resolutions: int) -> tuple[Part, str]:
    """Returns the converter and our name for a key such as down_0.block_1 or up_2.upsample."""
    if key in FIXED:
        return FIXED[key]
    where, _, part = key.partition(".")
    way, _, index = where.partition("_")
    kind, _, number = part.partition("_")
    at = f"{way}.{int(index) if way == 'down' else resolutions - 1 - int(index)}"
    if way in ("down", "up") and kind == "block":
        return _block, f"{at}.blocks.{int(number)}"
    if way in ("down", "up") and kind == "attn":
        return _attention, f"{at}.attentions.{int(number)}"
    if (way, kind) in (("down", "downsample"), ("up", "upsample")):
        return _resampling, f"{at}.resample"
    raise KeyError(key)


def state_dict_of(parameters: Parameters, resolutions: int, path: Path) -> State:
    """Returns the original's parameters under our names, axes in torch's order, in float32.

    Raises InputError that names the first part which the paper's network does not have.
    """
    state: State = {}
    for key, value in parameters.items():
        try:
            convert_part, name = _place_of(key, resolutions)
            state |= {n: t.float().contiguous() for n, t in convert_part(name, value).items()}
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError):
            raise InputError(
                f"{path}: its {key!r} is not a part of the paper's network as it should be"
            ) from None
    return state


if __name__ == "__main__":
    sys.exit(main())
