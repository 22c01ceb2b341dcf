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
    # The truncation reduces the standard deviation to 0.8796, which is divided out.
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def initialised(layer: nn.Conv2d | nn.Linear, zero: bool = False) -> nn.Conv2d | nn.Linear:
    """Returns the layer with LeCun normal weights (or zeros) and zero biases."""
    with torch.no_grad():
        if zero:
            layer.weight.zero_()
        else:
            lecun_normal_(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def conv(in_channels: int, out_channels: int, size: int = 3, zero: bool = False) -> nn.Module:
    """Returns a convolution that keeps height and width."""
    layer = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    return initialised(layer, zero)


def linear(in_features: int, out_features: int, zero: bool = False) -> nn.Module:
    """Returns a dense layer."""
    return initialised(nn.Linear(in_features, out_features), zero)


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns GroupNorm with gcd(32, channels) groups and eps 1e-6."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def sinusoids(angle: Float[Tensor, "b"], slowest: float, channels: int) -> Float[Tensor, "b d"]:
    """Returns [sin, cos] of angle * f, with frequencies f log-spaced from 1 to 1 / slowest.

    One zero is appended if channels is odd (Vaswani et al. 2017; the original code).
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=angle.dtype, device=angle.device) / (half - 1)
    angles = angle[:, None] * torch.exp(-math.log(slowest) * exponent)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


def time_features(logsnr: Float[Tensor, "b"], channels: int) -> Float[Tensor, "b channels"]:
    """Returns sinusoids of 1000 inv_cos(logsnr), with frequencies from 1 to 1/10000.

    inv_cos = atan(e^(-clip(logsnr, -20, 20) / 2)) / (pi / 2), in (0, 1) (the original code).
    """
    time = 1000.0 * torch.atan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)
    return sinusoids(time, 10_000.0, channels)


def guidance_features(guidance: Float[Tensor, "b"], channels: int) -> Float[Tensor, "b channels"]:
    """Returns sinusoids of the guidance weight (Meng et al. 2023), with periods from 1 to 100."""
    return sinusoids(2.0 * math.pi * guidance, 100.0, channels)


class ConvDownsample(nn.Module):
    """A stride-2 3x3 convolution, padded by one at the bottom and the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h/2 w/2"]:
        """Halves height and width. The embedding is not used."""
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class ConvUpsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c 2*h 2*w"]:
        """Doubles height and width. The embedding is not used."""
        return self.conv(upsample(h))


def downsample(h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h/2 w/2"]:
    """Halves height and width by 2x2 average pooling."""
    return F.avg_pool2d(h, 2)


def upsample(h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
    """Doubles height and width by nearest neighbour."""
    return F.interpolate(h, scale_factor=2.0, mode="nearest")


RESAMPLING: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda h: h,
    "down": downsample,
    "up": upsample,
}


class PlainResample(nn.Module):
    """Resampling without weights. to: a key of RESAMPLING."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.resample = RESAMPLING[to]

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c i j"]:
        """Halves or doubles height and width. The embedding is not used."""
        return self.resample(h)


class ResBlock(nn.Module):
    """A residual block with scale-shift norm by the embedding, and optional resampling.

    resample: a key of RESAMPLING, applied before the first convolution and to the skip connection.
    The skip has a 1x1 convolution only if the number of channels changes.
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
        """Returns the features after the block. embedding: of time and condition."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """Returns softmax(q k / sqrt(width)) v (Vaswani et al. 2017).

    On a CPU, where PyTorch's kernel is slow in bfloat16 and its backward pass slower still, that is
    two matrix products and a softmax. So many tokens that these would take too much memory go
    through the kernel in float32.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    if q.shape[2] * k.shape[2] > 256**2:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    q, k, v = (x.contiguous() for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


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
        """Returns x plus the attention over all pixels."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        attended = attend(q, k, v)
        out = self.out(rearrange(attended, "b heads n d -> b n (heads d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])
