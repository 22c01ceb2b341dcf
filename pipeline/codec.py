"""Codecs: they map uint8 images to what a model works on, pixels in [-1, 1] or latents, and back.

encode and decode are the codec of pixels.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.autoencoder_file import build_autoencoder, read_autoencoder
from pipeline.codec_sections import AutoencoderSection, CodecSection, PixelsSection, Shape
from utils.command import InputError


class Codec(NamedTuple):
    """encode: uint8 images (B, C, H, W) -> what the model works on, float32. decode: back to uint8.

    Both treat each image alone, apart from rounding, and pass no gradients. shape: (image size,
    channels) -> (C, H, W) of what the model works on.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    shape: Callable[[int, int], Shape]


def encode(images: Tensor) -> Tensor:
    """Maps uint8 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def decode(x: Tensor) -> Tensor:
    """Maps [-1, 1] to uint8, after clipping. decode(encode(u)) == u."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


PIXELS = Codec(encode, decode, PixelsSection().shape)
DECODED = 32  # images at a time: a decoder takes far more memory than its images


def open_pixels(section: PixelsSection, device: torch.device) -> Codec:
    """Returns the codec of pixels in [-1, 1]."""
    return PIXELS


def open_autoencoder(section: AutoencoderSection, device: torch.device) -> Codec:
    """Returns the codec of an autoencoder's latents, scaled to mean 0 and variance 1.

    An image is encoded to the mean of its latents' distribution. Raises InputError if the file is
    missing, not an autoencoder, or another one than the section's digest is of.
    """
    path = Path(section.file)
    stored = read_autoencoder(path)
    require_same_autoencoder(section, path, stored.digest)
    network = build_autoencoder(stored.sizes, stored.weights, device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (stored.mean, stored.std))

    @torch.no_grad()
    def encode_latents(images: Tensor) -> Tensor:
        return (network.moments(encode(images.to(device)))[0] - mean) / std

    @torch.no_grad()
    def decode_latents(z: Tensor) -> Tensor:
        latents = z.to(device).float() * std + mean
        parts = [decode(network.decode(part)) for part in latents.split(DECODED)]
        return torch.cat(parts).to(z.device)

    return Codec(encode_latents, decode_latents, section.shape)


def require_same_autoencoder(section: AutoencoderSection, path: Path, digest: str) -> None:
    """Raises InputError if the section is of another autoencoder than the one in the file."""
    if section.digest not in (None, digest):
        raise InputError(
            f"{path}: codec.file: not the autoencoder that the model was trained with (digest "
            f"{digest[:12]}, not {str(section.digest)[:12]}); put that one there"
        )


CODECS: dict[str, Callable[..., Codec]] = {"pixels": open_pixels, "autoencoder": open_autoencoder}


@lru_cache(maxsize=4)
def open_codec(section: CodecSection, device: torch.device) -> Codec:
    """Returns the codec of a config's section. It is read once, not for every use."""
    return CODECS[section.name](section, device)
