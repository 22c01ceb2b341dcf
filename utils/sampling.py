"""From a denoiser to images: the noise of each image, the sampler, batches, a progress bar."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.gaussian import Denoise, Denoiser, clipped, conditioned
from diffusion.samplers import OnStep, make_sampler
from diffusion.schedule import Schedule, sampling_levels
from utils.build import build_schedule, image_shape
from utils.config import Config
from utils.images import decode, make_grid, save_png
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
    on_step: OnStep | None = None,
    title: str = "sampling",
) -> Tensor:
    """One image for each of the noise's generators, in the model's range, as it comes out."""
    denoise: Denoise = denoiser if labels is None else conditioned(denoiser, label=labels)
    if clip:
        denoise = clipped(denoise)
    with tqdm(total=num_steps, desc=title, unit="step", leave=False) as bar:

        def step(i: int, z: Tensor, prediction: object) -> None:
            bar.update()
            if on_step is not None:
                on_step(i, z, prediction)  # type: ignore[arg-type]

        return make_sampler(sampler)(
            denoise,
            noise.draw(),
            sampling_levels(schedule, num_steps).to(noise.device),
            draw_noise=noise.draw,
            on_step=step,
        )


def save_sample_grid(
    path: Path, config: Config, denoiser: Denoiser, num_steps: int, title: str
) -> None:
    """Draws config.sampling.grid images as the config says and writes them as one PNG."""
    device = next(denoiser.network.parameters()).device  # type: ignore[attr-defined]
    indices = range(config.sampling.grid)
    noise = ImageNoise(config.seed, indices, image_shape(config), device)
    x = sample_batch(
        denoiser,
        build_schedule(config),
        num_steps,
        noise,
        sampler=config.sampling.sampler,
        clip=config.sampling.clip,
        labels=as_labels(labels_for(indices, config.model.num_classes), device),
        title=title,
    )
    save_png(path, make_grid(decode(x)), scale=2)


def labels_for(indices: Sequence[int], num_classes: int | None) -> list[int] | None:
    """The classes in turn, image by image; None for a model without classes."""
    return None if num_classes is None else [index % num_classes for index in indices]


def as_labels(labels: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Labels as the network takes them."""
    return None if labels is None else torch.tensor(labels, device=device)
