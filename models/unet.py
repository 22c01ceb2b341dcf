"""The UNet of Salimans & Ho 2022 and of its JAX code, with every size an argument."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Conditioned
from models.layers import (
    Attention,
    ConvDownsample,
    ConvUpsample,
    PlainResample,
    ResBlock,
    conv,
    group_norm,
)


class Resolution(nn.Module):
    """Residual blocks at one resolution, attention after each, and a resampling."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[Attention], resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def block(
        self, n: int, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b d h w"]:
        """Applies the n-th residual block, and its attention if this resolution has any."""
        h = self.blocks[n](h, embedding)
        return self.attentions[n](h) if self.attentions else h


class Down(Resolution):
    """A resolution on the way down."""

    def forward(
        self,
        h: Float[Tensor, "b c h w"],
        embedding: Float[Tensor, "b e"],
        skips: list[Float[Tensor, "b _ _ _"]],
    ) -> Float[Tensor, "b d i j"]:
        """Applies all blocks and the resampling, and pushes each output onto the skips."""
        for n in range(len(self.blocks)):
            h = self.block(n, h, embedding)
            skips.append(h)
        if self.resample is not None:
            h = self.resample(h, embedding)
            skips.append(h)
        return h


class Up(Resolution):
    """A resolution on the way up."""

    def forward(
        self,
        h: Float[Tensor, "b c h w"],
        embedding: Float[Tensor, "b e"],
        skips: list[Float[Tensor, "b _ _ _"]],
    ) -> Float[Tensor, "b d i j"]:
        """Applies all blocks, each to its input joined with the skip popped, and the resampling."""
        for n in range(len(self.blocks)):
            h = self.block(n, torch.cat([h, skips.pop()], dim=1), embedding)
        return h if self.resample is None else self.resample(h, embedding)


@dataclass(frozen=True)
class Parts:
    """Builds the parts of a UNet, which share these sizes (see UNet)."""

    embedding_channels: int
    dropout: float
    attention_heads: int
    attention_head_dim: int | None
    resample: str

    def block(self, in_channels: int, out_channels: int, to: str | None = None) -> ResBlock:
        """Returns a residual block. to: its resampling, a key of RESAMPLING."""
        return ResBlock(in_channels, out_channels, self.embedding_channels, self.dropout, to)

    def attention(self, width: int) -> Attention:
        """Returns attention over `width` channels."""
        dim = self.attention_head_dim
        return Attention(width, width // dim if dim else self.attention_heads)

    def resampling(self, width: int, to: str) -> nn.Module:
        """Returns a layer that halves (to = down) or doubles (to = up) height and width."""
        if self.resample == "block":
            return self.block(width, width, to)
        if self.resample == "plain":
            return PlainResample(to)
        return ConvDownsample(width) if to == "down" else ConvUpsample(width)

    def down(self, in_channels: int, width: int, count: int, attends: bool, last: bool) -> Down:
        """Returns a resolution of the way down with `count` blocks; the last does not resample."""
        blocks = [self.block(in_channels if n == 0 else width, width) for n in range(count)]
        attentions = [self.attention(width) for _ in range(count if attends else 0)]
        return Down(blocks, attentions, None if last else self.resampling(width, "down"))

    def up(self, in_channels: int, width: int, skips: list[int], attends: bool, last: bool) -> Up:
        """Returns a resolution of the way up, with a block for each of the skips' widths."""
        widths = [in_channels] + [width] * (len(skips) - 1)
        blocks = [self.block(a + b, width) for a, b in zip(widths, skips, strict=True)]
        attentions = [self.attention(width) for _ in range(len(skips) if attends else 0)]
        return Up(blocks, attentions, None if last else self.resampling(width, "up"))


class UNet(Conditioned):
    """(z, logsnr, label, guidance) -> output: the UNet of Salimans & Ho 2022 and its JAX code.

    image_size, image_channels: of z; output_channels: the image's or a multiple (OUTPUT_TYPES).
    channels: width of the first resolution; embedding_channels: width of the embedding, None for
    4 x channels. channel_multipliers: one for each resolution; all but the last halve height and
    width. attention_resolutions: the heights, after patch folding, at which every residual block
    is followed by attention, with attention_heads heads or, if given, with heads of width
    attention_head_dim. resample: block (in a residual block), conv or plain (2x2 average pooling
    and nearest neighbour, without weights). patch_size p folds p x p pixels into channels first
    and unfolds them last. num_classes, guidance: see Conditioned. input_features: n for each
    sin(2^n pi z) and cos(2^n pi z) beside z, which show small differences (Kingma et al. 2021).
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        output_channels: int,
        channels: int,
        embedding_channels: int | None,
        channel_multipliers: Sequence[int],
        blocks_per_level: int,
        attention_resolutions: Sequence[int],
        attention_heads: int,
        attention_head_dim: int | None,
        dropout: float,
        resample: str,
        patch_size: int,
        num_classes: int | None,
        guidance: bool = False,
        input_features: Sequence[int] = (),
    ) -> None:
        embedding_channels = embedding_channels or 4 * channels
        super().__init__(channels, embedding_channels, num_classes, guidance)
        self.patch_size, self.input_features = patch_size, input_features
        self.blocks_per_level = blocks_per_level
        parts = Parts(embedding_channels, dropout, attention_heads, attention_head_dim, resample)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        attends = [
            image_size // patch_size >> n in attention_resolutions for n in range(len(widths))
        ]
        last = len(widths) - 1

        inputs = image_channels * (1 + 2 * len(input_features))
        self.conv_in = conv(inputs * patch_size**2, channels)

        skips, width = [channels], channels  # skips: the widths that the way down pushes
        self.down = nn.ModuleList()
        for n, out in enumerate(widths):
            self.down.append(parts.down(width, out, blocks_per_level, attends[n], n == last))
            skips += [out] * (blocks_per_level + (n < last))
            width = out

        self.middle_in, self.middle_out = parts.block(width, width), parts.block(width, width)
        self.middle_attention = parts.attention(width)

        self.up = nn.ModuleList()
        for n, out in reversed(list(enumerate(widths))):
            joined = [skips.pop() for _ in range(blocks_per_level + 1)]
            self.up.append(parts.up(width, out, joined, attends[n], n == 0))
            width = out

        self.norm_out = group_norm(width)
        self.conv_out = conv(width, output_channels * patch_size**2, zero=True)

    def forward(
        self,
        z: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
        guidance: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Returns the network's output for noisy images z at noise levels logsnr.

        label: their classes, -1 for none; guidance: the weights of classifier-free guidance, for a
        network that takes them.
        """
        p = self.patch_size
        embedding = self.embed(logsnr, label, guidance)
        h, skips = self._to_the_middle(z, embedding)
        for resolution in self.up:
            h = resolution(h, embedding, skips)
        output = self.conv_out(F.silu(self.norm_out(h)))
        return rearrange(output, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def feature_maps(
        self,
        z: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """Returns what each resolution on the way down ends with, and the middle: maps of z."""
        h, skips = self._to_the_middle(z, self.embed(logsnr, label, None))
        return [*skips[self.blocks_per_level :: self.blocks_per_level + 1], h]

    def _to_the_middle(
        self, z: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b _ _ _"], list[Float[Tensor, "b _ _ _"]]]:
        """Returns the middle's output, and what the way up is joined with."""
        p = self.patch_size
        if self.input_features:
            angles = torch.cat([2**n * math.pi * z for n in self.input_features], dim=1)
            z = torch.cat([z, angles.sin(), angles.cos()], dim=1)
        h = self.conv_in(rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p))
        skips = [h]
        for resolution in self.down:
            h = resolution(h, embedding, skips)
        h = self.middle_in(h, embedding)
        return self.middle_out(self.middle_attention(h), embedding), skips
