"""Randomness as a pure function of a key: nothing depends on earlier draws."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Returns a generator seeded by the key alone, e.g. (seed, stage, update)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_indices(num_images: int, batch_size: int, seed: int, stage: int, update: int) -> Tensor:
    """Returns the indices of an update's images. Each epoch is a new permutation of all images.

    A function of its arguments alone, so that a resumed run sees the same images.
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
    """Noise for sampling images, a function of (seed, image index) alone.

    The first draw is the initial z, later ones are for stochastic samplers. shape: (C, H, W) of one
    image. Drawn on the CPU, so that the noise is the same for every device and batch size.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.generators = [generator("cpu", seed, "image", index) for index in indices]
        self.shape, self.device = shape, device

    def draw(self) -> Tensor:
        """Returns the next standard normal noise, float32 (B, C, H, W)."""
        images = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(images).to(self.device)
