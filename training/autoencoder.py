"""Training an autoencoder: what it learns, what is drawn of it, and its file."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from diffusion.objectives import Objective, Tensors
from models.autoencoder import Autoencoder
from pipeline.autoencoder_file import StoredAutoencoder, build_autoencoder, write_autoencoder
from pipeline.checkpoint import Checkpoint
from pipeline.codec import decode, encode
from pipeline.config import Config
from pipeline.engine import accelerated, allow_tf32
from pipeline.latents import latent_scale
from pipeline.network import build_autoencoder_in_training
from training.stage import Stage, base_stage
from training.stages import Task, train_stage
from training.starts import Run
from training.trainee import Trainee
from utils.command import InputError
from utils.images import make_grid

PICTURED = 32  # images, each with what the autoencoder makes of it below
FILE = "autoencoder.safetensors"


def train_autoencoder(run: Run, stage: Stage) -> Path:
    """Trains the config's autoencoder from where an earlier run left it; returns its file.

    Writes autoencoder-<update>.pt, with a picture beside each, and at the end FILE with the
    averaged weights and the scale of the latents.
    """
    task = Task(reconstruction_objective, draw_reconstructions)
    trained = train_stage(run, stage, autoencoder_start(run), task=task)
    path = run.output / FILE
    if run.world.leads:
        sizes = run.config.autoencoder.sizes(run.config.data.channels)
        weights = {name.removeprefix("kl."): t for name, t in trained.weights.items()}
        network = build_autoencoder(sizes, weights, run.world.device)
        scale = latent_scale(network, run.dataset, run.world.device)
        write_autoencoder(path, StoredAutoencoder(sizes, *scale, weights))
    return path


def autoencoder_stage(config: Config) -> Stage:
    """Returns the training of the config's autoencoder. Raises InputError if it does not fit."""
    size, factor = config.data.image_size, config.autoencoder.sizes(1).downsampling
    if size % factor or size == factor:
        raise InputError(
            f"data.image_size: {size} is not a multiple of {factor}, twice or more, by which the "
            f"{len(config.autoencoder.channels)} levels of autoencoder.channels divide it"
        )
    if config.codec.name != "pixels":
        raise InputError("codec: an autoencoder is trained on pixels; leave this section out")
    return replace(base_stage(config), of_autoencoder=True, conditional=False)


def autoencoder_start(run: Run) -> Checkpoint:
    """Returns the autoencoder before its first update."""
    torch.manual_seed(run.config.seed)
    network = build_autoencoder_in_training(run.config, run.world.device)
    return Checkpoint(
        kind="autoencoder",
        name=run.name,
        config=run.config,
        update=0,
        stage=0,
        model=network.state_dict(),
    )


def reconstruction_objective(
    run: Run, stage: Stage, trainee: Trainee, start: Checkpoint, teacher: Checkpoint | None
) -> Objective:
    """What an autoencoder learns: to give images back, with latents near N(0, 1).

    |x_hat - x| or its square + kl_weight KL(q(z | x) || N(0, 1)), both per pixel, x_hat decoded
    from z = mean + std eps (Kingma & Welling 2014, equation 10). Its images have no noise:
    logsnr = +inf.
    """
    config, device = run.config, run.world.device
    recipe, sizes = config.autoencoder, config.autoencoder.sizes(config.data.channels)
    allow_tf32(config.engine)
    network = accelerated(trainee.called, config.engine, device)

    def draw(rng: torch.Generator, shape: torch.Size) -> Tensors:
        size = shape[-1] // sizes.downsampling
        latents = (shape[0], sizes.latent_channels, size, size)
        return {"eps": torch.randn(latents, generator=rng, device=rng.device)}

    def losses(x: Tensor, condition: Tensors, drawn: Tensors) -> tuple[Tensor, Tensor]:
        x_hat, mean, logvar = (t.float() for t in network(x, drawn["eps"]))
        difference = (x_hat - x).flatten(1)
        error = difference.abs() if recipe.loss == "l1" else difference.square()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
        loss = error.mean(1) + recipe.kl_weight * kl / x[0].numel()
        return loss, torch.full_like(loss, torch.inf)

    return Objective(draw, losses)


@torch.no_grad()
def draw_reconstructions(
    run: Run, trainee: Trainee, checkpoint: Checkpoint
) -> tuple[Tensor, Tensor]:
    """Draws the first images of the data, each with what the average makes of it below.

    Returns the picture, and what the average has made.
    """
    network = cast(Autoencoder, trainee.ema or trainee.network)
    indices = torch.arange(min(PICTURED, run.dataset.num_images))
    images, _ = next(iter(run.dataset.batches([indices])))
    made = decode(network.decode(network.moments(encode(images))[0]))
    columns = min(16, len(images))
    rows = zip(images.split(columns), made.split(columns), strict=True)
    padded = [
        torch.cat([row, row.new_zeros(columns - len(row), *row.shape[1:])])
        for pair in rows
        for row in pair
    ]
    return make_grid(torch.cat(padded), columns=columns), made
