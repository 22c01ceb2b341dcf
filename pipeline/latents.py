"""The latents of an autoencoder: their scale, and what a run's config says of them."""

from pathlib import Path
from typing import Any

import torch

from models.autoencoder import Autoencoder
from pipeline.autoencoder_file import (
    StoredAutoencoder,
    build_autoencoder,
    read_autoencoder,
    read_folder,
    write_autoencoder,
)
from pipeline.checkpoint_checks import digest
from pipeline.codec import encode, require_same_autoencoder
from pipeline.config import Config, make_config
from pipeline.data import Dataset
from utils.command import InputError, say
from utils.processes import World
from utils.randomness import generator

MEASURED = 1024  # images whose latents' mean and standard deviation are taken
BATCH = 32
CODEC_FILE = "codec.safetensors"  # of a run whose codec.file is a folder


@torch.no_grad()
def latent_scale(
    network: Autoencoder, dataset: Dataset, device: torch.device
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel of the latents of MEASURED images.

    Dividing by the standard deviation gives latents the variance 1 that noise has (Rombach et al.
    2022, appendix G). Raises InputError if a channel is the same everywhere.
    """
    order = torch.randperm(dataset.num_images, generator=generator("cpu", "latents"))[:MEASURED]
    parts = [
        network.moments(encode(images.to(device)))[0].cpu().double()
        for images, _ in dataset.batches(order.split(BATCH))
    ]
    std, mean = torch.std_mean(torch.cat(parts), dim=(0, 2, 3), correction=0)
    if not (std > 1e-6).all():
        raise InputError(
            f"the latent channel {int(std.argmin())} is the same for all images; train the "
            "autoencoder for longer, or with fewer latent channels or a smaller kl_weight"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def with_codec(config: Config, where: object) -> Config:
    """Returns the config with what its autoencoder's file says of the latents filled in.

    where: its origin, for errors. Raises InputError if the file is missing, no autoencoder or not
    the one that the config says, or if its latents do not fit the data or the network. The scale of
    a folder's latents is not known yet: see with_folder_measured.
    """
    section = config.codec
    if section.name == "pixels":
        return config
    path = Path(section.file)
    stored: dict[str, Any] = {}
    if path.is_dir():
        if section.digest is not None:
            raise InputError(
                f"{path}: codec.file: a folder, but the model was trained with a file, such as "
                f"{CODEC_FILE} beside the base model; give that one"
            )
        sizes, weights = read_folder(path)
        stored["digest"] = digest(weights)  # until it has a scale
    else:
        if section.digest is None and not path.exists():  # of a model that is to be trained
            raise InputError(
                f"{path}: codec.file: no such file; train an autoencoder first (python -m "
                "tools.train_autoencoder --config_path configs/mnist_autoencoder.yaml)"
            )
        autoencoder = read_autoencoder(path)
        require_same_autoencoder(section, path, autoencoder.digest)
        sizes, stored["digest"] = autoencoder.sizes, autoencoder.digest
    stored |= {"latent_channels": sizes.latent_channels, "downsampling": sizes.downsampling}
    for key, value in stored.items():
        if getattr(section, key) not in (None, value):
            raise InputError(
                f"{where}: codec.{key}: {getattr(section, key)}, but {value} in {path}; leave it "
                "out"
            )
    if sizes.in_channels != config.data.channels:
        raise InputError(
            f"{where}: data.channels: {config.data.channels}, but the autoencoder in {path} is of "
            f"images with {sizes.in_channels}; take the same"
        )
    return _with_section(config, where, **stored)


def with_folder_measured(
    config: Config, where: object, output: Path, dataset: Dataset, world: World
) -> Config:
    """Returns the config with a file of the run in place of a folder of diffusers (codec.file).

    It holds the autoencoder and the scale of its latents, which are measured once. Any other config
    is returned as it is.
    """
    if config.codec.name == "pixels" or not Path(config.codec.file).is_dir():
        return config
    folder, path = Path(config.codec.file), output / CODEC_FILE
    sizes, weights = read_folder(folder)
    if world.leads and not path.exists():
        say(f"measuring the latents of {folder}: {path}")
        network = build_autoencoder(sizes, weights, world.device)
        scale = latent_scale(network, dataset, world.device)
        write_autoencoder(path, StoredAutoencoder(sizes, *scale, weights))
    world.wait()
    stored = read_autoencoder(path)
    if (stored.sizes, digest(stored.weights)) != (sizes, digest(weights)):
        raise InputError(
            f"{path}: of another autoencoder than {folder} (codec.file); give another folder "
            "(--output), or begin anew (--restart)"
        )
    return _with_section(config, where, file=str(path), digest=stored.digest)


def _with_section(config: Config, where: object, **changes: Any) -> Config:
    values = config.model_dump(mode="json")
    return make_config({**values, "codec": values["codec"] | changes}, str(where))
