"""The codec: maps uint8 images to what a model works on, pixels in [-1, 1], and back."""

import torch
from torch import Tensor


def encode(images: Tensor) -> Tensor:
    """Maps uint8 0 .. 255 to float32 in [-1, 1], the model's range."""
    return images.float() / 127.5 - 1.0


def decode(x: Tensor) -> Tensor:
    """Maps the model's range to uint8, after clipping to [-1, 1]. decode(encode(u)) == u."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
