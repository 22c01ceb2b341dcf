"""The critic of an adversarial loss: small heads on the features of a frozen diffusion model."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDTH, GROUPS = 64, 8


class Critic(nn.Module):
    """Feature maps of noised images -> one value an image and map, high for real images.

    widths: the channels of each map. The features of a diffusion model know noised images already,
    so that heads of a few layers learn in hundreds of updates (Sauer et al. 2024, LADD).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(width) for width in widths)

    def forward(self, features: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b n"]:
        """Returns the values, the mean over the pixels of what each head says."""
        pairs = zip(self.heads, features, strict=True)
        return torch.stack([head(maps).flatten(1).mean(1) for head, maps in pairs], dim=1)


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 1),
        nn.GroupNorm(GROUPS, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
        nn.GroupNorm(GROUPS, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, 1, 3, padding=1),
    )
