"""What images are compared by: the features of a frozen network."""

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
from utils.command import InputError
from utils.progress import progress_bar

BATCH_SIZE = 250


class Features(NamedTuple):
    """values: (N, D). logits: of the classes, (N, K), None where the network knows none of ours."""

    values: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None

    def first(self, count: int) -> "Features":
        """Of the first images."""
        return Features(self.values[:count], None if self.logits is None else self.logits[:count])


@dataclass(frozen=True)
class Extractor:
    """A frozen network: uint8 images (B, C, H, W) -> Features, on the CPU in float32.

    name: one of EXTRACTORS. identity: a digest of its weights and of how they are used; distances
    by features of another identity cannot be compared.
    """

    name: str
    identity: str
    call: Callable[[Tensor], Features]

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"], title: str = "features") -> Features:
        """The features of all images, a batch at a time."""
        parts = []
        with progress_bar(len(images), title, "image", leave=False) as bar:
            for batch in images.split(BATCH_SIZE):
                parts.append(self.call(batch))
                bar.update(len(batch))
        values = torch.cat([part.values for part in parts])
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(values, torch.cat(logits) if logits else None)


Made = tuple[str, Callable[[Tensor], Features]]  # an identity, a network


def _digits(device: torch.device) -> Made:
    network = load_digit_network(device)
    identity = digest(["brightness along the image's own colour", network.state_dict()])

    def call(images: Tensor) -> Features:
        features, logits = network(encode(fit(brightness(images), 32, 1).to(device)))
        return Features(features.cpu(), logits.cpu())

    return identity, call


def brightness(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Digits of any colour on black, as bright as white ones.

    Each pixel is projected onto the image's own colour, the mean of its pixels weighted by their
    brightness, with its largest part full. (The largest channel of each pixel alone would take
    the largest of three noises, and thicken the strokes of samples.)
    """
    pixels = images.float()
    color = (pixels * pixels.amax(1, keepdim=True)).sum((2, 3), keepdim=True)
    color = color / color.amax(1, keepdim=True).clamp(min=1)
    length = (color * color).sum(1, keepdim=True).clamp(min=1)  # 1 or more, but of a black image
    projected = (pixels * color).sum(1, keepdim=True) / length
    return projected.round().clamp(max=255).to(torch.uint8)


def _inception(device: torch.device) -> Made:
    """Inception-v3 of the original Frechet distances, 2048 features (torch-fidelity)."""
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        # The library unpickles the file: harmless where a loader that runs no code reads it too.
        torch.load(path, weights_only=True)
    except Exception as error:  # of networks, and of damaged or foreign files
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
    """The extractor of that name. Raises InputError for an unknown one or missing weights."""
    if name not in EXTRACTORS:
        raise InputError(f"--features {name}: not one of {', '.join(EXTRACTORS)}")
    return Extractor(name, *EXTRACTORS[name](device))
