"""Randomness as a pure function of what it is for: nothing depends on what was drawn before."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator whose state is a function of the key alone, e.g. (seed, stage, update)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_indices(num_images: int, batch_size: int, seed: int, stage: int, update: int) -> Tensor:
    """Which images the update sees: every epoch is a permutation of all of them, end to end.

    A function of its arguments alone, so that a resumed run sees what it would have seen.
    """
    start = update * batch_size
    parts = []
    while batch_size > 0:
        epoch, offset = divmod(start, num_images)
        order = _permutation(num_images, seed, stage, epoch)
        parts.append(order[offset : offset + batch_size])
        start, batch_size = start + len(parts[-1]), batch_size - len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, stage: int, epoch: int) -> Tensor:
    order = generator("cpu", seed, "order", stage, epoch)
    return torch.randperm(num_images, generator=order)


class ImageNoise:
    """The noise of sampled images, each a function of (seed, image index) and nothing else.

    The first draw is where a sampler starts, later ones are what it adds on the way. shape: of one
    image, (C, H, W). Drawn on the CPU, so that every device and batch size gives the same images.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.generators = [generator("cpu", seed, "image", index) for index in indices]
        self.shape, self.device = shape, device

    def draw(self) -> Tensor:
        """Standard normal noise, (B, C, H, W) in float32."""
        images = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(images).to(self.device)
