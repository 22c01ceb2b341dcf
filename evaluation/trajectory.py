"""Trajectory agreement: how far a student's images lie from its teacher's, from the same noise."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.gaussian import Denoiser
from pipeline.build import build_denoiser, image_shape
from pipeline.checkpoint import Checkpoint, digest
from pipeline.config import Config
from pipeline.network import build_network, load_weights
from pipeline.sampling import class_labels, sample_batch
from utils.files import atomic_write
from utils.processes import World
from utils.randomness import ImageNoise

NUM_IMAGES = 64  # over which a trajectory error is taken


def ddim_images(
    config: Config,
    denoiser: Denoiser,
    num_steps: int,
    indices: range,
    device: torch.device,
    title: str,
) -> Float[Tensor, "n c h w"]:
    """The images of these indices that DDIM makes in so many steps from the run's own noise.

    Not clipped. Their noise is a function of (config.seed, image index), so that every network of
    a run starts from the same. Returns float32 (N, C, H, W), on the CPU.
    """
    num_classes = config.model.num_classes
    images = sample_batch(
        denoiser,
        build_schedule(config),
        num_steps,
        ImageNoise(config.seed, indices, image_shape(config), device),
        clip=False,
        labels=class_labels(indices, None if num_classes is None else range(num_classes), device),
        title=title,
    )
    return images.cpu()


def trajectory_error(
    images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
) -> float:
    """The mean squared distance to the reference, over the first 64 images and all pixels."""
    difference = images[:NUM_IMAGES].double() - reference[:NUM_IMAGES].double()
    return difference.square().mean().item()


class Trajectories:
    """The images of a ladder's networks from the same noise, made once and kept in a file.

    All processes ask for the same images and share the work; the first keeps the file.
    """

    def __init__(self, path: Path, config: Config, world: World) -> None:
        self.path, self.config, self.world = path, config, world
        self.images: dict[str, Tensor] = {}
        if world.leads and path.exists():
            try:
                self.images = load_file(path)
            except (SafetensorError, OSError):
                path.unlink()  # damaged: what it held can be made again

    def of(
        self, checkpoint: Checkpoint, where: Path, num_steps: int, title: str
    ) -> Float[Tensor, "n c h w"]:
        """The unclipped DDIM images in so many steps of the checkpoint that lies there.

        Of all images in the first process; in the others they are not to be looked at.
        """
        count = max(NUM_IMAGES, self.config.sampling.grid)
        key = f"{num_steps} {self.config.sampling.grid} {digest(checkpoint.weights)}"
        if not self.world.agree(int(key in self.images)):
            self.images[key] = self._draw(checkpoint, where, num_steps, count, title)
            if self.world.leads:
                with atomic_write(self.path) as file:
                    file.write(save(self.images))
        return self.images.get(key, torch.zeros(count, *image_shape(self.config)))

    def _draw(
        self, checkpoint: Checkpoint, where: Path, num_steps: int, count: int, title: str
    ) -> Tensor:
        """Each process draws its share, and all get all."""
        device = self.world.device
        network = build_network(self.config, device).eval()
        load_weights(network, checkpoint.weights, where)
        denoiser = build_denoiser(self.config, network, device)
        size = min(64, math.ceil(count / self.world.size))
        images = torch.zeros(count, *image_shape(self.config))
        for start in range(size * self.world.rank, count, size * self.world.size):
            part = range(start, min(start + size, count))
            images[part.start : part.stop] = ddim_images(
                self.config, denoiser, num_steps, part, device, title
            )
        return self.world.sum(images.to(device)).cpu()
