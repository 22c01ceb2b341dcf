"""The features of a frozen network, by which images are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.digits import load_digit_network
from pipeline.checkpoint import digest
from pipeline.codec import encode
from pipeline.data import fit
from pipeline.engine import allow_tf32
from pipeline.sections import EngineConfig
from utils.command import InputError
from utils.progress import progress_bar

BATCH_SIZE = 250


class Features(NamedTuple):
    """values: (N, D). logits: of the classes, (N, K); None if the network has other classes."""

    values: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None


@dataclass(frozen=True)
class Extractor:
    """A frozen network: uint8 images (B, C, H, W) -> Features, on the CPU in float32.

    name: a key of EXTRACTORS. identity: a digest of its weights and its preprocessing; only
    distances of the same identity can be compared.
    """

    name: str
    identity: str
    call: Callable[[Tensor], Features]

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"], title: str = "features") -> Features:
        """Returns the features of all images, computed a batch at a time."""
        allow_tf32(EngineConfig(tf32=False))  # whatever the sampler before it was allowed
        parts = []
        with progress_bar(len(images), title, "image", leave=False) as bar:
            for batch in images.split(BATCH_SIZE):
                parts.append(self.call(batch))
                bar.update(len(batch))
        values = torch.cat([part.values for part in parts])
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(values, torch.cat(logits) if logits else None)


Made = tuple[str, Callable[[Tensor], Features]]  # identity and call of an Extractor


def _digits(device: torch.device) -> Made:
    network = load_digit_network(device)
    identity = digest(["brightness along the image's own colour", network.state_dict()])

    def call(images: Tensor) -> Features:
        features, logits = network(encode(fit(brightness(images), 32, 1).to(device)))
        return Features(features.cpu(), logits.cpu())

    return identity, call


def brightness(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Returns grey images of coloured digits on black, as bright as white digits.

    Each pixel is projected onto the image's colour: the mean of its pixels, weighted by their
    brightness and scaled so that its largest channel is 1. (The maximum over the channels would
    also be the maximum of their noise, and make the strokes of samples thicker.)
    """
    pixels = images.float()
    color = (pixels * pixels.amax(1, keepdim=True)).sum((2, 3), keepdim=True)
    color = color / color.amax(1, keepdim=True).clamp(min=1)
    length = (
        (color * color).sum(1, keepdim=True).clamp(min=1)
    )  # at least 1 unless the image is black
    projected = (pixels * color).sum(1, keepdim=True) / length
    return projected.round().clamp(max=255).to(torch.uint8)


def _inception(device: torch.device) -> Made:
    """The 2048 features of Inception-v3, as in the original FID (weights of torch-fidelity)."""
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        # The library unpickles the file: first check that a loader which runs no code accepts it.
        torch.load(path, weights_only=True)
    except Exception as error:  # network errors, and damaged or other files
        raise InputError(
            f"--features inception: {path}: could not be downloaded, or is not what it should be "
            f"({str(error)[:80]}); put {URL_INCEPTION_V3} there, or take --features digits"
        ) from None
    network: Any = FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device).eval()

    def call(images: Tensor) -> Features:
        (features,) = network(images.expand(-1, 3, -1, -1).to(device))
        return Features(features.float().cpu(), None)

    return digest(["2048 features", network.state_dict()]), call


EXTRACTORS = {"digits": _digits, "inception": _inception}


def make_extractor(name: str, device: torch.device) -> Extractor:
    """Returns the extractor. Raises InputError for an unknown name or missing weights."""
    if name not in EXTRACTORS:
        raise InputError(f"--features {name}: not one of {', '.join(EXTRACTORS)}")
    return Extractor(name, *EXTRACTORS[name](device))
