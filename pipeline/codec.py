"""A codec maps uint8 images to what a model works on, and back: pixels in [-1, 1]."""

import torch
from torch import Tensor


def encode(images: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 [-1, 1], the range the model works in."""
    return images.float() / 127.5 - 1.0


def decode(x: Tensor) -> Tensor:
    """The model's range -> uint8, what lies outside [-1, 1] clipped. decode(encode(u)) == u."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
