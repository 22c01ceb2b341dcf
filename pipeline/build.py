"""From a config to the things it names: the one place that knows both."""

from pathlib import Path

import torch
from torch import nn

from diffusion.gaussian import Denoiser
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, EngineConfig
from pipeline.data import Dataset, open_dataset
from pipeline.engine import accelerated, allow_tf32, sampling_engine
from pipeline.network import build_network, load_weights
from utils.command import InputError


def build_denoiser(config: Config, network: nn.Module, device: torch.device) -> Denoiser:
    """The network as config.engine has it called, with what its output means."""
    allow_tf32(config.engine)
    called = accelerated(network, config.engine, device)
    return Denoiser(called, config.diffusion.prediction)


def load_denoiser(
    checkpoint: Checkpoint,
    where: Path,
    device: torch.device,
    engine: EngineConfig | None = None,
) -> Denoiser:
    """Returns the checkpoint's frozen network with what its output means.

    where: its file, for errors. engine: how to call it; by default as sampling_engine says.
    """
    engine = engine or sampling_engine(checkpoint.config.engine, device)
    config = checkpoint.config.model_copy(update={"engine": engine})
    network = build_network(config, device, dropout=0.0).eval().requires_grad_(False)
    load_weights(network, checkpoint.weights, where)
    return build_denoiser(config, network, device)


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
