"""Grids of images, and PNG and GIF files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from utils.files import atomic_write

GAP = 2  # pixels between the tiles of a grid


def to_pillow(image: Tensor) -> Image.Image:
    """Returns a uint8 image (C, H, W) of 1 or 3 channels as a Pillow image."""
    array = rearrange(image.cpu(), "c h w -> h w c").squeeze(-1).numpy()
    return Image.fromarray(array)


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tiles uint8 images (B, C, H, W) into one (C, H', W'), by default about a square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    tiles = torch.nn.functional.pad(torch.cat([images, blank]), (0, GAP, 0, GAP), value=64)
    grid = rearrange(tiles, "(rows columns) c h w -> c (rows h) (columns w)", rows=rows)
    return grid[:, : grid.shape[1] - GAP, : grid.shape[2] - GAP]


def by_class(images: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, int | None]:
    """Sorts images drawn for the classes in turn, for a grid with one row for each class.

    Returns the images, without those of an incomplete last turn, and the number of columns. With
    fewer than two classes: the images as they are, and None.
    """
    turns = len(images) // len(classes) if classes else 0
    if classes is None or len(classes) == 1 or not turns:
        return images, None
    whole = images[: turns * len(classes)]
    return rearrange(whole, "(n k) c h w -> (k n) c h w", k=len(classes)), turns


def save_figure(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as PNG."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def save_png(path: Path, image: Tensor, scale: int = 1) -> None:
    """Writes one uint8 image (C, H, W), each pixel scale x scale."""
    enlarged = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with atomic_write(path) as file:
        to_pillow(enlarged).save(file, format="PNG")


def save_gif(path: Path, frames: Sequence[Tensor], scale: int = 2, milliseconds: int = 80) -> None:
    """Writes uint8 images (C, H, W) as an animation that pauses on its last frame."""
    images = [to_pillow(f.repeat_interleave(scale, 1).repeat_interleave(scale, 2)) for f in frames]
    durations = [milliseconds] * (len(images) - 1) + [2000]
    with atomic_write(path) as file:
        later = images[1:]
        images[0].save(file, "GIF", save_all=True, append_images=later, duration=durations, loop=0)
