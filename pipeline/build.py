"""Builds denoisers and data sets from a config."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.adversarial import Features
from diffusion.gaussian import Denoiser
from models.dit import DiT
from models.unet import UNet
from pipeline.checkpoint import Checkpoint
from pipeline.codec_sections import Shape
from pipeline.config import Config
from pipeline.data import Dataset, open_dataset
from pipeline.engine import accelerated, allow_tf32, autocast, sampling_engine
from pipeline.network import build_network, load_weights
from pipeline.network import image_shape as image_shape
from pipeline.sections import EngineConfig
from utils.command import InputError


def build_denoiser(config: Config, network: nn.Module, device: torch.device) -> Denoiser:
    """Returns a Denoiser that calls the network as config.engine says."""
    allow_tf32(config.engine)
    called = accelerated(network, config.engine, device)
    return Denoiser(called, config.diffusion.prediction, config.diffusion.clip)


def load_denoiser(
    checkpoint: Checkpoint, where: Path, device: torch.device, engine: EngineConfig | None = None
) -> Denoiser:
    """Returns a Denoiser with the checkpoint's frozen network.

    where: its file, for errors. engine: how to run it; None for sampling_engine.
    """
    engine = engine or sampling_engine(checkpoint.config.engine, device)
    allow_tf32(engine)
    return frozen_denoiser(checkpoint, where, device, engine)


def frozen_denoiser(
    checkpoint: Checkpoint, where: Path, device: torch.device, engine: EngineConfig
) -> Denoiser:
    """Returns what load_denoiser does, and leaves torch's settings and random state as they are."""
    called = accelerated(_frozen_network(checkpoint, where, device), engine, device)
    diffusion = checkpoint.config.diffusion
    return Denoiser(called, diffusion.prediction, diffusion.clip)


def frozen_features(
    checkpoint: Checkpoint, where: Path, device: torch.device, engine: EngineConfig
) -> Features:
    """Returns (z, logsnr, **condition) -> feature maps, of the checkpoint's frozen network.

    Raises InputError for a network without features.
    """
    network = _frozen_network(checkpoint, where, device)
    if not isinstance(network, UNet | DiT):
        raise InputError(
            f"{where}: distillation.losses: adversarial takes the features of the teacher, of a "
            f"unet or a dit; of a {checkpoint.config.model.name} there are none"
        )
    if checkpoint.config.model.guidance:
        raise InputError(
            f"{where}: distillation.losses: adversarial takes the features of a teacher without "
            "guidance weight, but this one takes a weight; begin the ladder with an unguided one"
        )

    def features(z: Tensor, logsnr: Tensor, **condition: Any) -> list[Tensor]:
        with autocast(engine, device):
            maps = network.feature_maps(z, logsnr.to(z.dtype), **condition)
        return [one.to(z.dtype) for one in maps]

    return features


def _frozen_network(checkpoint: Checkpoint, where: Path, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # a new network has random weights
        network = build_network(checkpoint.config, device, dropout=0.0)
    network.eval().requires_grad_(False)
    load_weights(network, checkpoint.weights, where)
    return network


def build_dataset(config: Config, device: torch.device, name: str | None = None) -> Dataset:
    """Returns the config's data. Raises InputError if the model needs other classes.

    name: of another data set, to be read in the same size.
    """
    data, name = config.data, name or config.data.name
    dataset = open_dataset(name, data.root, data.image_size, data.channels, data.workers, device)
    asked = config.model.num_classes
    if asked is not None and asked != dataset.num_classes:
        raise InputError(
            f"model.num_classes: {asked}, but {name} has {dataset.num_classes or 'no'} classes"
        )
    return dataset


def pixel_shape(config: Config) -> Shape:
    """Returns (C, H, W) of one uint8 image."""
    return config.data.channels, config.data.image_size, config.data.image_size
