"""From a checkpoint to images: the noise of each image, the sampler, batches, files."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffusion.gaussian import Denoise, Denoiser, Prediction, clipped, guided
from diffusion.samplers import OnStep, make_sampler
from diffusion.schedule import Schedule, sampling_levels
from pipeline.build import build_schedule, image_shape
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config
from pipeline.image_folder import IMAGE_SUFFIXES
from training.folder import require_no_run, run_in, writes
from utils.command import InputError, warn
from utils.files import atomic_write, make_folder
from utils.images import by_class, decode, make_grid, save_gif, save_png, to_pillow
from utils.processes import World
from utils.progress import progress_bar
from utils.randomness import ImageNoise


def sample_batch(
    denoiser: Denoiser,
    schedule: Schedule,
    num_steps: int,
    noise: ImageNoise,
    *,
    sampler: str = "ddim",
    clip: bool,
    labels: Tensor | None = None,
    guidance: float = 0.0,
    on_step: OnStep | None = None,
    title: str = "sampling",
) -> Tensor:
    """One image for each of the noise's generators, float, in the model's range or near it."""
    denoise: Denoise = denoiser if labels is None else guided(denoiser, labels, guidance)
    if clip:
        denoise = clipped(denoise)
    with progress_bar(num_steps, title, "step", leave=False) as bar:

        def step(i: int, z: Tensor, prediction: Prediction) -> None:
            bar.update()
            if on_step is not None:
                on_step(i, z, prediction)

        return make_sampler(sampler)(
            denoise,
            noise.draw(),
            sampling_levels(schedule, num_steps).to(noise.device),
            draw_noise=noise.draw,
            on_step=step,
        )


def class_labels(
    indices: Sequence[int], classes: Sequence[int] | None, device: torch.device
) -> Tensor | None:
    """The classes in turn, image by image; None for a model without classes."""
    if classes is None:
        return None
    return torch.tensor([classes[index % len(classes)] for index in indices], device=device)


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: everything but which images, and where to."""

    config: Config
    denoiser: Denoiser
    world: World
    num_steps: int
    sampler: str
    clip: bool
    seed: int
    classes: Sequence[int] | None
    guidance: float = 0.0
    batch_size: int = 64

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        denoiser: Denoiser,
        world: World,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        clip: bool | None = None,
        seed: int | None = None,
        labels: str | None = None,
        guidance: float = 0.0,
        batch_size: int = 64,
    ) -> "SampleRequest":
        """The request as the checkpoint would have it, but for what is given.

        Raises InputError for values that cannot be; warns of those that a distilled model was not
        made for.
        """
        sampling, own = checkpoint.config.sampling, checkpoint.num_steps
        if sampler is None:
            sampler = "ddim" if own else sampling.sampler
        try:
            make_sampler(sampler)
        except ValueError as error:
            raise InputError(f"--sampler: {error}") from None
        if own and steps not in (None, own):
            warn(
                f"this student was distilled for {own} steps: it learnt to jump between those "
                f"noise levels alone, so {steps} steps ask it for jumps it has never seen"
            )
        if own and sampler != "ddim":
            warn(
                f"this student was distilled for DDIM: {sampler} asks for the mean of the images "
                "at each level, of which a student keeps one, and looks blurred or noisy"
            )
        classes = _parse_labels(labels, checkpoint.config.model.num_classes)
        if guidance:
            _require_guidable(guidance, checkpoint)
        return cls(
            config=checkpoint.config,
            denoiser=denoiser,
            world=world,
            num_steps=steps or own or sampling.steps,
            sampler=sampler,
            clip=sampling.clip if clip is None else clip,
            seed=checkpoint.config.seed if seed is None else seed,
            classes=classes,
            guidance=guidance,
            batch_size=batch_size,
        )

    def draw(self, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """The uint8 images of these indices, each a function of seed and index alone."""
        x = sample_batch(
            self.denoiser,
            build_schedule(self.config),
            self.num_steps,
            ImageNoise(self.seed, indices, image_shape(self.config), self.world.device),
            sampler=self.sampler,
            clip=self.clip,
            labels=class_labels(indices, self.classes, self.world.device),
            guidance=self.guidance,
            on_step=on_step,
        )
        return decode(x).cpu().contiguous()

    def draw_all(self, count: int, bar: bool = False) -> Tensor:
        """The first images: each process draws its share of them, and all get all of them."""
        images = torch.zeros(count, *image_shape(self.config), dtype=torch.uint8)
        for indices, drawn in self.batches(count, bar):
            images[indices.start : indices.stop] = drawn
        return self.world.sum(images.to(self.world.device)).cpu()

    def batches(self, count: int, bar: bool = True) -> Iterator[tuple[range, Tensor]]:
        """This process's share of the first images, a batch at a time."""
        size = min(self.batch_size, math.ceil(count / self.world.size))
        starts = range(size * self.world.rank, count, size * self.world.size)
        with progress_bar(count, "images", "image", shown=bar) as images:
            for start in starts:
                indices = range(start, min(count, start + size))
                yield indices, self.draw(indices)
                images.update(min(count - images.n, len(indices) * self.world.size))


def _require_guidable(weight: float, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if not 0.0 <= weight <= 1000.0:  # not NaN either
        raise InputError(f"--guidance {weight}: take a number from 0 to 1000")
    if config.model.num_classes is None:
        raise InputError(
            f"--guidance {weight}: this checkpoint knows no classes; leave --guidance out"
        )
    if checkpoint.num_steps or not config.training.label_dropout:
        warn(
            "this model was never shown images without their class (training.label_dropout of a "
            "base model), so guidance asks it for what it has not learnt"
        )


def _parse_labels(text: str | None, num_classes: int | None) -> Sequence[int] | None:
    if text is None:
        return None if num_classes is None else range(num_classes)
    if num_classes is None:
        raise InputError(f"--labels {text}: this checkpoint knows no classes; leave --labels out")
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--labels {text}: not whole numbers with commas, e.g. 0,1,2") from None
    if not all(-1 <= label < num_classes for label in labels):
        raise InputError(f"--labels {text}: classes go from 0 to {num_classes - 1}; -1 is none")
    return labels


# --- files --------------------------------------------------------------------------------------


# Endings of names that nobody means a folder by.
FILE_SUFFIXES = IMAGE_SUFFIXES | {
    *(".npy", ".h5", ".hdf5", ".parquet", ".pkl", ".pickle", ".pt", ".pth", ".safetensors"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"),
    *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".html", ".pdf", ".svg"),
    *(".avif", ".heic", ".jfif", ".mp4", ".mkv", ".webm", ".avi", ".mov"),
}


def require_output(path: Path, many: bool) -> None:
    """Raises InputError, before anything is drawn, where the images cannot go to this path.

    many: a folder of images, or an .npz; else one .png. A run's folder and pictures are its own.
    """
    suffix = path.suffix.lower()
    if not many and suffix != ".png":
        raise InputError(f"--output {path}: a grid is a .png; for files give --count")
    if many and suffix in FILE_SUFFIXES:
        raise InputError(f"--output {path}: with --count, a folder or a .npz")
    if suffix in (".png", ".npz"):
        if path.is_dir():
            raise InputError(f"--output {path}: a folder, where a {suffix} file is asked for")
        if writes(path.name) and run_in(path.parent):
            raise InputError(f"--output {path}: {run_in(path.parent)} writes it; give another name")
    else:
        require_no_run(path)
    folder = path.parent if suffix in (".png", ".npz") else path
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: not allowed to write there")


def write_grid(
    path: Path, request: SampleRequest, count: int, trajectory: bool = False
) -> list[Path]:
    """Writes a grid of images; with trajectory, a GIF and a strip of the denoising beside it.

    The processes share a grid's images; a trajectory is drawn by one alone.
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
    # Two rows an image, z_t above and x_hat below; the last column is the image itself.
    tiles = rearrange(torch.stack(strip), "n b two c h w -> (b two n) c h w")
    save_png(png, make_grid(tiles, columns=len(strip)), scale=2)
    return [path, gif, png]


def write_folder(folder: Path, request: SampleRequest, count: int) -> list[Path]:
    """Writes 000000.png, 000001.png, .. into the folder.

    Raises InputError where it holds other pictures, which would be taken for some of these.
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
    """Writes one array arr_0, uint8 (N, H, W, C), as the common evaluation suites read it."""
    images = request.draw_all(count, bar=True)
    if request.world.leads:
        with atomic_write(path) as file:
            np.savez(file, rearrange(images, "n c h w -> n h w c").numpy())
    return [path]
