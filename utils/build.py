"""From a config to the things it names: the one place that knows both."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.gaussian import OUTPUT_TYPES, Denoiser
from diffusion.schedule import Schedule, make_schedule
from models.unet import UNet
from utils.checkpoint import Checkpoint
from utils.command import InputError
from utils.config import Config
from utils.data import Dataset, open_dataset
from utils.engine import accelerated, allow_tf32, sampling_engine


def build_network(config: Config, device: torch.device, dropout: float | None = None) -> UNet:
    """The config's network with fresh weights, in the memory format that the device likes.

    GPUs convolve channels_last. On a CPU that gains up to 5% on wide networks, but GroupNorm with
    one channel a group, as small networks have it, then takes several times as long.
    """
    sizes = config.model.model_dump()
    if dropout is not None:
        sizes["dropout"] = dropout
    channels = config.data.channels
    network = UNet(
        image_size=config.data.image_size,
        image_channels=channels,
        output_channels=channels * OUTPUT_TYPES[config.diffusion.prediction].channels,
        **sizes,
    )
    fast = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=fast)  # type: ignore[call-overload]


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Puts the weights of a checkpoint into the network. Raises InputError if they do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(f"{where}: weights of another network: {first[0].strip()}") from None


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
