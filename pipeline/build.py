"""From a config to the things it names: the one place that knows both."""

from pathlib import Path

import torch
from torch import nn

from diffusion.gaussian import Denoiser
from diffusion.schedule import Schedule, make_schedule
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config
from pipeline.data import Dataset, open_dataset
from pipeline.engine import accelerated, allow_tf32, sampling_engine
from pipeline.network import build_network, load_weights
from utils.command import InputError


def build_denoiser(config: Config, network: nn.Module, device: torch.device) -> Denoiser:
    """The network as config.engine has it called, with what its output means."""
    allow_tf32(config.engine)
    called = accelerated(network, config.engine, device)
    return Denoiser(called, config.diffusion.prediction)


def load_denoiser(checkpoint: Checkpoint, where: Path, device: torch.device) -> Denoiser:
    """The checkpoint's network, ready to be sampled. where: its file, for errors."""
    engine = sampling_engine(checkpoint.config.engine, device)
    config = checkpoint.config.model_copy(update={"engine": engine})
    network = build_network(config, device).eval()
    load_weights(network, checkpoint.weights, where)
    return build_denoiser(config, network, device)


def build_schedule(config: Config) -> Schedule:
    """The config's noise schedule."""
    diffusion = config.diffusion
    return make_schedule(diffusion.schedule, diffusion.logsnr_min, diffusion.logsnr_max)


def build_dataset(config: Config, device: torch.device) -> Dataset:
    """The config's data. Raises InputError if it has not the classes that the model asks for."""
    data = config.data
    dataset = open_dataset(
        data.name, data.root, data.image_size, data.channels, data.workers, device
    )
    asked = config.model.num_classes
    if asked is not None and asked != dataset.num_classes:
        raise InputError(
            f"model.num_classes: {asked}, but {data.name} has {dataset.num_classes or 'no'} classes"
        )
    return dataset


def image_shape(config: Config) -> tuple[int, int, int]:
    """(C, H, W) of one image."""
    return config.data.channels, config.data.image_size, config.data.image_size
