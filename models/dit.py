"""The Diffusion Transformer (Peebles & Xie 2023) with adaLN-Zero blocks, and its config section."""

import math
from typing import Annotated, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Conditioned
from models.layers import attend, linear
from utils.values import Fraction, Positive, Section

TIME_FEATURES = 256  # sinusoids of the noise level, as in the paper's code


class DiTSection(Section):
    """The transformer's sizes. The defaults are DiT-S/2 of the paper.

    channels: the width of a token; depth: the number of blocks; mlp_ratio: the width of a block's
    hidden layer over that of a token. guidance: whether the guidance weight is an input.
    """

    name: Literal["dit"]
    channels: Annotated[int, Field(ge=4, le=2**14)] = 384
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    attention_heads: Annotated[int, Field(ge=1, le=1024)] = 6
    mlp_ratio: Annotated[Positive, Field(le=64.0)] = 4.0
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    dropout: Fraction = 0.0
    num_classes: Annotated[int, Field(ge=1, le=2**20)] | None = None
    guidance: bool = False

    def misfit(self, image_size: int, where: str) -> str | None:
        """Returns why the network cannot take images of this size, or None if it can.

        where: the dotted key of this section, for the message.
        """
        if image_size % self.patch_size:
            return (
                f"data.image_size: {image_size} is not divisible by the {self.patch_size} of "
                f"{where}.patch_size"
            )
        if self.channels % 4:
            return (
                f"{where}.channels: {self.channels} is not divisible by 4, for the sines and "
                "cosines of two coordinates"
            )
        if self.channels % self.attention_heads:
            return (
                f"{where}.attention_heads: {self.attention_heads} does not divide the "
                f"{self.channels} channels of a token"
            )
        return None


def positions(size: int, channels: int) -> Float[Tensor, "n channels"]:
    """Returns the fixed embedding of size x size positions: sines and cosines of row and column.

    For each coordinate p: sin(p f), cos(p f) with channels / 4 frequencies f = 10000^(-4k/channels)
    (Vaswani et al. 2017; Peebles & Xie 2023). Positions are in the order of their rows.
    """
    count = channels // 4
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(count) / count)
    angles = torch.arange(size)[:, None] * frequency
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = one.repeat_interleave(size, 0), one.repeat(size, 1)
    return torch.cat([columns, rows], dim=1)


def modulate(
    h: Float[Tensor, "b n c"], shift: Float[Tensor, "b c"], scale: Float[Tensor, "b c"]
) -> Float[Tensor, "b n c"]:
    """Returns h (1 + scale) + shift, for all tokens alike."""
    return h * (1 + scale[:, None]) + shift[:, None]


def xavier(in_features: int, out_features: int) -> nn.Linear:
    """Returns a dense layer with Xavier uniform weights and zero biases, as in the paper's code."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Attention and a two-layer perceptron; the embedding shifts, scales and gates both.

    adaLN-Zero: the gates start at zero, so that a new block changes nothing.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = linear(channels, 6 * channels, zero=True)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = xavier(channels, 3 * channels), xavier(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.mlp_in, self.mlp_out = xavier(channels, hidden), xavier(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b n c"], embedding: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b n c"]:
        """Returns the tokens after the block. embedding: of time and condition."""
        parts = self.modulation(F.silu(embedding)).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = rearrange(
            h, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        h = rearrange(attend(q, k, v), "b heads n d -> b n (heads d)")
        x = x + gate1[:, None] * self.dropout(self.out(h))
        h = F.gelu(self.mlp_in(modulate(self.norm2(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.dropout(self.mlp_out(h))


class DiT(Conditioned):
    """(z, logsnr, label, guidance) -> output: the Diffusion Transformer of Peebles & Xie 2023.

    image_size, image_channels: of z; output_channels: the image's or a multiple (OUTPUT_TYPES). The
    sizes are those of DiTSection. Noise level, class and guidance weight enter as in the UNet.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        output_channels: int,
        channels: int,
        depth: int,
        attention_heads: int,
        mlp_ratio: float,
        patch_size: int,
        dropout: float,
        num_classes: int | None,
        guidance: bool = False,
    ) -> None:
        super().__init__(TIME_FEATURES, channels, num_classes, guidance)
        self.patch_size = patch_size
        self.patch_in = xavier(image_channels * patch_size**2, channels)
        embedded = positions(image_size // patch_size, channels)
        self.register_buffer("positions", embedded, persistent=False)
        hidden = int(channels * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(channels, attention_heads, hidden, dropout) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.modulation_out = linear(channels, 2 * channels, zero=True)
        self.patch_out = linear(channels, output_channels * patch_size**2, zero=True)

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
        h = self._tokens(z)
        for block in self.blocks:
            h = block(h, embedding)
        shift, scale = self.modulation_out(F.silu(embedding)).chunk(2, dim=1)
        output = self.patch_out(modulate(self.norm_out(h), shift, scale))
        rows = z.shape[2] // p
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)

    def feature_maps(
        self,
        z: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """Returns the tokens after each block of the first half, as maps of z."""
        embedding, rows = self.embed(logsnr, label, None), z.shape[2] // self.patch_size
        h, maps = self._tokens(z), []
        for block in self.blocks[: (len(self.blocks) + 1) // 2]:
            h = block(h, embedding)
            maps.append(rearrange(h, "b (h w) c -> b c h w", h=rows))
        return maps

    def _tokens(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Returns the tokens before the first block."""
        p = self.patch_size
        tokens = rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return self.patch_in(tokens) + self.positions  # type: ignore[no-any-return]
