"""Features of images in several untrained, random convolutional networks.

They know nothing of any data set, so that a loss may use them without leading samples towards
whatever a trained network measures (cf. Embedding Loss 2026, which matches distributions in them).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

NUM_NETWORKS = 4
WIDTHS = (32, 64, 64)  # of the 3x3 convolutions of each; every one halves height and width
POOLED = 4  # pixels a side at most, in a feature vector


@lru_cache(maxsize=8)
def _filters(network: int, channels: int, device: torch.device) -> tuple[Tensor, ...]:
    """The weights of one network, a function of its number (He et al. 2015)."""
    rng = torch.Generator().manual_seed(network)
    shapes = [(out, inputs, 3, 3) for inputs, out in zip((channels, *WIDTHS), WIDTHS, strict=False)]
    drawn = [torch.randn(s, generator=rng) * (2 / (9 * s[1])) ** 0.5 for s in shapes]
    return tuple(weight.to(device) for weight in drawn)


def feature_maps(x: Float[Tensor, "b c h w"]) -> Iterator[list[Float[Tensor, "b _ _ _"]]]:
    """For each network the feature maps behind each of its convolutions. x: images in [-1, 1]."""
    for network in range(NUM_NETWORKS):
        maps, h = [], x
        for weight in _filters(network, x.shape[1], x.device):
            h = F.leaky_relu(F.conv2d(h, weight.to(x.dtype), padding=1), 0.2)
            maps.append(h)
            if min(h.shape[-2:]) > 1:
                h = F.avg_pool2d(h, 2)
        yield maps


def feature_vectors(x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _"]]:
    """For each network one vector an image: its maps, averaged to at most 4x4 pixels each."""
    vectors = []
    for maps in feature_maps(x):
        sizes = [(min(POOLED, m.shape[-2]), min(POOLED, m.shape[-1])) for m in maps]
        pooled = [F.adaptive_avg_pool2d(m, s).flatten(1) for m, s in zip(maps, sizes, strict=True)]
        vectors.append(torch.cat([part / part.shape[1] ** 0.5 for part in pooled], dim=1))
    return vectors
