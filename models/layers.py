"""The parts of the UNet: time embedding, residual block, attention, resampling.

Salimans & Ho 2022 (the original JAX code), which follows Ho et al. 2020 and Dhariwal & Nichol 2021.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def lecun_normal_(weight: Float[Tensor, "out ..."]) -> None:
    """LeCun normal initialisation: variance 1 / fan_in, truncated at two standard deviations."""
    fan_in = weight[0].numel()
    # The truncated normal's own standard deviation is 0.8796: it is divided out.
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def initialised(layer: nn.Conv2d | nn.Linear, zero: bool = False) -> nn.Conv2d | nn.Linear:
    """The layer with its bias at 0 and its weight LeCun normal, or at 0."""
    with torch.no_grad():
        if zero:
            layer.weight.zero_()
        else:
            lecun_normal_(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def conv(in_channels: int, out_channels: int, size: int = 3, zero: bool = False) -> nn.Module:
    """A convolution that keeps height and width."""
    layer = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    return initialised(layer, zero)


def linear(in_features: int, out_features: int, zero: bool = False) -> nn.Module:
    """A dense layer."""
    return initialised(nn.Linear(in_features, out_features), zero)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of as many as divide both 32 and the channels; eps 1e-6."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def time_features(logsnr: Float[Tensor, "b"], channels: int) -> Float[Tensor, "b channels"]:
    """Sinusoids of 1000 inv_cos(logsnr), [sin, cos], one zero appended if channels is odd.

    inv_cos = atan(e^(-clip(logsnr, -20, 20) / 2)) / (pi / 2), in (0, 1); frequencies
    e^(-k ln(10000) / (half - 1)), half = channels // 2 (the original code; Vaswani et al. 2017).
    """
    time = 1000.0 * torch.atan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)
    half = channels // 2
    exponent = torch.arange(half, dtype=logsnr.dtype, device=logsnr.device) / (half - 1)
    angle = time[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, channels % 2))


class ConvDownsample(nn.Module):
    """A stride-2 3x3 convolution, padded by one at the bottom and the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h/2 w/2"]:
        """Halves height and width; the embedding is not looked at."""
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class ConvUpsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c 2*h 2*w"]:
        """Doubles height and width; the embedding is not looked at."""
        return self.conv(upsample(h))


def downsample(h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h/2 w/2"]:
    """2x2 average pooling."""
    return F.avg_pool2d(h, 2)


def upsample(h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
    """Nearest neighbour x2."""
    return F.interpolate(h, scale_factor=2.0, mode="nearest")


RESAMPLING: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda h: h,
    "down": downsample,
    "up": upsample,
}


class PlainResample(nn.Module):
    """A resampling without weights. to: a key of RESAMPLING."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.resample = RESAMPLING[to]

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c i j"]:
        """Halves or doubles height and width; the embedding is not looked at."""
        return self.resample(h)


class ResBlock(nn.Module):
    """A residual block, modulated by the embedding (scale-shift norm), which may resample.

    resample: a key of RESAMPLING, done between the first activation and convolution and on the
    raw skip alike. The skip has a 1x1 convolution only where the channels change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        dropout: float,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resample = RESAMPLING[resample]
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.scale_shift = linear(embedding_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, zero=True)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip = conv(in_channels, out_channels, size=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b d i j"]:
        """x: features; embedding: of time and class."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual connection (Vaswani et al. 2017).

    softmax(q k / sqrt(width)) v in each head; channel index = head * width + d.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels)
        self.out = linear(channels, channels, zero=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x: features of any height and width."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        out = self.out(rearrange(attended, "b heads n d -> b n (heads d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])
