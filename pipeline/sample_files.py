"""Writes samples: a grid, a GIF and a strip of the denoising, a folder of PNGs, or one .npz."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffusion.gaussian import Prediction
from pipeline.image_folder import IMAGE_SUFFIXES
from pipeline.sampling import SampleRequest
from utils.command import InputError
from utils.files import atomic_write
from utils.images import by_class, make_grid, save_gif, save_png, to_pillow


def write_grid(
    path: Path, request: SampleRequest, count: int, trajectory: bool = False
) -> list[Path]:
    """Writes a grid of images and, with trajectory, a GIF and a strip of the denoising.

    The processes share the images of a grid; a trajectory is drawn by rank 0 alone. Returns the
    files.
    """
    if not trajectory:
        grid = make_grid(*by_class(request.draw_all(count), request.classes))
        if request.world.leads:
            save_png(path, grid, scale=2)
        return [path]
    if not request.world.leads:
        return []
    frames: list[Tensor] = []
    strip: list[Tensor] = []
    kept = {round(n * (request.num_steps - 1) / 11) for n in range(12)}
    shown = {round(n * (request.num_steps - 1) / 59) for n in range(60)}

    decode = request.codec.decode

    def on_step(i: int, z: Tensor, prediction: Prediction) -> None:
        if i in shown:
            frames.append(make_grid(*by_class(decode(z).cpu(), request.classes)))
        if i in kept:
            strip.append(torch.stack([decode(z[:6]), decode(prediction.x[:6])], dim=1).cpu())

    drawn = request.draw(range(count), on_step)
    frames.append(make_grid(*by_class(drawn, request.classes)))
    strip.append(drawn[:6, None].expand(-1, 2, -1, -1, -1))
    gif, png = path.with_suffix(".gif"), path.with_name(f"{path.stem}-strip.png")
    save_png(path, frames[-1], scale=2)
    save_gif(gif, frames)
    # Two rows for each image: z_t, and x_hat below; the last column is the image itself.
    tiles = rearrange(torch.stack(strip), "n b two c h w -> (b two n) c h w")
    save_png(png, make_grid(tiles, columns=len(strip)), scale=2)
    return [path, gif, png]


def write_folder(folder: Path, request: SampleRequest, count: int) -> list[Path]:
    """Writes 000000.png, 000001.png, .. into the folder, and returns the folder.

    Raises InputError if it contains other pictures, which would be mistaken for samples.
    """

    def ours(path: Path) -> bool:
        number = path.stem
        return number.isdecimal() and int(number) < count and path == _picture(folder, int(number))

    pictures = {path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    request.world.wait()  # before anybody writes
    if others := {path for path in pictures if not ours(path)}:
        raise InputError(
            f"{folder}: holds {len(others)} other pictures, {min(others).name} for one; give "
            "another folder (--output)"
        )
    for indices, images in request.batches(count):
        for index, image in zip(indices, images, strict=True):
            with atomic_write(_picture(folder, index)) as file:
                to_pillow(image).save(file, format="PNG")
    request.world.wait()
    return [folder]


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def write_npz(path: Path, request: SampleRequest, count: int) -> list[Path]:
    """Writes one array arr_0, uint8 (N, H, W, C), the format of common evaluation suites."""
    images = request.draw_all(count, bar=True)
    if request.world.leads:
        with atomic_write(path) as file:
            np.savez(file, rearrange(images, "n c h w -> n h w c").numpy())
    return [path]
