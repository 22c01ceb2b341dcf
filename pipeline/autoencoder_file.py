"""Files of autoencoders: ours, one .safetensors, and folders in the format of diffusers."""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
from pydantic import Field, ValidationError

from models.autoencoder import Autoencoder, AutoencoderSizes
from pipeline.checkpoint_checks import State, digest, read_safetensors, require_finite
from pipeline.diffusers_folder import WEIGHTS, read_json, read_weights
from pipeline.network import load_weights, mismatch
from utils.command import DamagedCheckpoint, InputError
from utils.files import atomic_write
from utils.values import ListOf, Positive, Section

FORMAT = "progressive-distillation autoencoder"
FORMAT_VERSION = 1
HEADER = "autoencoder"  # the entry of the file's metadata
WHAT = "an autoencoder"
CONFIG = "config.json"  # of diffusers


class _Header(Section):
    """The header of our file, but for its format and digest. mean, std: of each latent channel."""

    sizes: AutoencoderSizes
    mean: ListOf[Annotated[float, Field(allow_inf_nan=False)]]
    std: ListOf[Positive]


class StoredAutoencoder(NamedTuple):
    """An autoencoder with the scale of its latents.

    mean, std: of each channel of the latents of the data that it was made for. weights: of
    diffusers' AutoencoderKL, under its names.
    """

    sizes: AutoencoderSizes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: State

    @property
    def header(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        return {"sizes": self.sizes.model_dump(mode="json"), "mean": self.mean, "std": self.std}

    @property
    def digest(self) -> str:
        """The SHA-256 of all that its latents and images depend on."""
        return digest({**self.header, "weights": self.weights})


def write_autoencoder(path: Path, autoencoder: StoredAutoencoder) -> None:
    """Writes the autoencoder, or leaves the existing file as it was."""
    weights = {name: t.detach().cpu().contiguous() for name, t in autoencoder.weights.items()}
    require_finite(weights, f"{path}: not written")
    entries = {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": autoencoder.digest}
    # One text: safetensors writes several in any order, and equal files should have equal bytes.
    text = json.dumps({**entries, **autoencoder.header})
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(weights, {HEADER: text}))


def read_autoencoder(path: Path) -> StoredAutoencoder:
    """Returns the autoencoder in a file of write_autoencoder, on the CPU, without running any code.

    Raises InputError that names the file and what is wrong.
    """
    header, weights = read_safetensors(path, WHAT)
    try:
        entries = json.loads(header.get(HEADER, "null"))
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(f"{path}: damaged, its header is no JSON") from None
    if not isinstance(entries, dict) or entries.pop("format", None) != FORMAT:
        raise InputError(
            f"{path}: not an autoencoder; take a file of tools/train_autoencoder.py, or a folder "
            f"with {CONFIG} and {WEIGHTS}"
        )
    version, stored_digest = (entries.pop(name, None) for name in ("format_version", "digest"))
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version!r}; this code reads {FORMAT_VERSION}")
    known = _checked(_Header, entries, path)
    autoencoder = StoredAutoencoder(known.sizes, known.mean, known.std, weights)
    if autoencoder.digest != stored_digest:
        raise DamagedCheckpoint(f"{path}: damaged, its content is not what was saved")
    if not len(known.mean) == len(known.std) == known.sizes.latent_channels:
        raise InputError(f"{path}: mean, std: not one of each of its latent channels")
    require_weights_fit(autoencoder.sizes, weights, path)
    return autoencoder


def read_folder(folder: Path) -> tuple[AutoencoderSizes, State]:
    """Returns sizes and weights of an AutoencoderKL that diffusers has saved to a folder.

    Weights in another format than safetensors, which would run code when read, are refused.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("_class_name") != "AutoencoderKL":
        found = str(config.get("_class_name"))[:60]
        raise InputError(f"{path}: _class_name: {found!r}, where AutoencoderKL is needed")
    config = {
        name: value for name, value in config.items() if name in AutoencoderSizes.model_fields
    }
    sizes = _checked(AutoencoderSizes, config, path)
    weights = read_weights(folder)
    require_weights_fit(sizes, weights, folder / WEIGHTS)
    return sizes, weights


def build_autoencoder(sizes: AutoencoderSizes, weights: State, device: torch.device) -> Autoencoder:
    """Returns the frozen network with these weights."""
    with torch.device("meta"):
        network = Autoencoder(sizes)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    load_weights(network.kl, weights, Path("codec.file"))
    return network


def require_weights_fit(sizes: AutoencoderSizes, weights: State, path: Path) -> None:
    """Raises InputError unless they are finite, and the weights of a network of these sizes."""
    try:
        with torch.device("meta"):
            wanted = Autoencoder(sizes).kl.state_dict()
    except RuntimeError:  # the number of bytes overflows
        raise InputError(f"{path}: asks for a network larger than any memory") from None
    if wrong := mismatch(weights, wanted):
        raise InputError(f"{path}: not the AutoencoderKL of its config: {wrong}")
    require_finite(weights, path)


def _checked(section: type[Any], values: dict[str, Any], path: Path) -> Any:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {key + ': ' if key else ''}{message}") from None
