"""This repository's UNet as a UNet2DModel of diffusers, which can hold it exactly.

Row i of the learned time embedding is our time features at the noise level of step i, t =
(i + 1) / N, so that the network knows the levels of one grid. The rest are names, but for the
projections q, k, v, which we keep in one matrix.
"""

import re
from pathlib import Path
from typing import Any

import torch

from diffusion.grids import Grid
from models.layers import guidance_features, time_features
from models.unet_section import UNetSection
from pipeline.checkpoint_checks import State
from utils.command import InputError

GROUPS = 32  # of every GroupNorm


def unet_config(
    model: UNetSection, image: tuple[int, int, int], steps: int, path: Path
) -> dict[str, Any]:
    """Returns the config of the UNet2DModel. Raises InputError for networks that it cannot be.

    image: the shape of an image, (C, H, W). path: the checkpoint's file, for errors.
    """
    if model.input_features:
        raise InputError(f"{path}: model.input_features: UNet2DModel has no such inputs")
    channels, image_size, _ = image
    folded = channels * model.patch_size**2
    sizes = [image_size // model.patch_size >> n for n in range(len(model.channel_multipliers))]
    attends = [size in model.attention_resolutions for size in sizes]
    # Levels without attention have a block type of their own for resampling in residual blocks.
    resnet = model.resample == "block"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else PLAIN_BLOCKS
    _require_widths(model.channels, model.channel_multipliers[0], path)
    return {
        "_class_name": "UNet2DModel",
        "sample_size": sizes[0],
        "in_channels": folded,
        "out_channels": folded,
        "time_embedding_type": "learned",
        "num_train_timesteps": steps,
        "time_embedding_dim": model.embedding_channels or 4 * model.channels,
        "block_out_channels": [model.channels * m for m in model.channel_multipliers],
        "layers_per_block": model.blocks_per_level,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attends)],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "downsample_padding": 0,  # that is, one pixel at the bottom and the right
        "attention_head_dim": _head_dim(model, attends, path),
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,  # or else the attention in the middle has no norm
        "norm_eps": 1e-6,
        "act_fn": "silu",
        "dropout": 0.0,
        "num_class_embeds": None if model.num_classes is None else model.num_classes + 1,
    }


PLAIN_BLOCKS = ("DownBlock2D", "UpBlock2D")


def _require_widths(channels: int, first_multiplier: int, path: Path) -> None:
    """Raises InputError for widths that UNet2DModel cannot have.

    It has one number of groups for all norms, and the last of them get channels and 2 x channels:
    these have the same gcd with 32 only if 32 divides both. And its first convolution is as wide as
    its first level, so that the first residual block has no convolution on its skip.
    """
    if channels % GROUPS:
        raise InputError(
            f"{path}: model.channels: {channels}; diffusers has as many groups in every norm, "
            f"so that it takes multiples of {GROUPS}"
        )
    if first_multiplier != 1:
        raise InputError(
            f"{path}: model.channel_multipliers: {first_multiplier} comes first; the first level "
            "of a UNet2DModel is as wide as its first convolution, so that it takes 1"
        )


def _head_dim(model: UNetSection, attends: list[bool], path: Path) -> int | None:
    """Returns the width of an attention head; None if each attention has one head."""
    if model.attention_head_dim:
        return model.attention_head_dim
    if model.attention_heads == 1:
        return None
    widths = [model.channels * m for m in model.channel_multipliers]
    # The middle, which is as wide as the last level, always attends.
    found = {w for w, a in zip(widths, attends, strict=True) if a} | {widths[-1]}
    if len(found) > 1:
        raise InputError(
            f"{path}: model.attention_heads: {model.attention_heads} heads over "
            f"{' and '.join(map(str, sorted(found)))} channels; the heads of a UNet2DModel all "
            "have the same width, as with model.attention_head_dim"
        )
    return found.pop() // model.attention_heads


# Our names -> those of UNet2DModel, one after the other.
NAMES = {
    r"^time_in\.": "time_embedding.linear_1.",
    r"^time_out\.": "time_embedding.linear_2.",
    r"^norm_out\.": "conv_norm_out.",
    r"^middle_in\.": "mid_block.resnets.0.",
    r"^middle_attention\.": "mid_block.attentions.0.",
    r"^middle_out\.": "mid_block.resnets.1.",
    r"^(down|up)\.(\d+)\.blocks\.": r"\1_blocks.\2.resnets.",
    r"^(down|up)\.(\d+)\.attentions\.": r"\1_blocks.\2.attentions.",
    r"^(down|up)\.(\d+)\.resample\.": r"\1_blocks.\2.\1samplers.0.",
    r"\.scale_shift\.": ".time_emb_proj.",
    r"\.skip\.": ".conv_shortcut.",
    r"\.norm\.": ".group_norm.",
    r"\.out\.": ".to_out.0.",
}


def unet_weights(model: UNetSection, ours: State, levels: Grid, guidance: float | None) -> State:
    """Returns the weights of the UNet2DModel. ours: those of models/unet.py.

    levels, guidance: the only noise levels and guidance weight that it will know.
    """
    weights = {name: tensor for name, tensor in ours.items() if "_embedding." not in name}
    if guidance is not None:  # a constant that is added to the embedding
        features = guidance_features(torch.tensor([guidance]), model.channels)
        added = torch.nn.functional.linear(
            features, ours["guidance_embedding.weight"], ours["guidance_embedding.bias"]
        )
        weights["time_out.bias"] = weights["time_out.bias"] + added[0]
    state: State = {}
    for name, tensor in weights.items():
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".qkv.", f".to_{part}.")] = rows
        else:
            state[name] = tensor
    state["time_proj.weight"] = time_features(levels[:-1].flip(0).float(), model.channels)
    if model.num_classes is not None:  # the last row is no class
        rows, bias = ours["class_embedding.weight"].T, ours["class_embedding.bias"]
        state["class_embedding.weight"] = torch.cat([rows + bias, bias[None]])
    if model.resample == "plain":
        widths = [model.channels * m for m in model.channel_multipliers]
        for n, (here, deeper) in enumerate(zip(widths, reversed(widths), strict=True)):
            if n < len(widths) - 1:
                state |= _convolution(f"down_blocks.{n}.downsamplers.0.conv", here, AVERAGE)
                state |= _convolution(f"up_blocks.{n}.upsamplers.0.conv", deeper, IDENTITY)
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


# 3x3 kernels: with stride 2 the first is 2x2 average pooling; the second changes nothing.
AVERAGE = ((0.25, 0.25, 0.0), (0.25, 0.25, 0.0), (0.0, 0.0, 0.0))
IDENTITY = ((0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0))


def _convolution(name: str, channels: int, kernel: tuple[tuple[float, ...], ...]) -> State:
    """Returns weights that apply the kernel to each channel."""
    weight = torch.eye(channels)[:, :, None, None] * torch.tensor(kernel)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(channels)}
