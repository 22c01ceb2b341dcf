"""The autoencoder of latent diffusion: the AutoencoderKL of diffusers, which is optional.

Kingma & Welling 2014; Rombach et al. 2022, section 3.1.
"""

import logging
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from utils.command import InputError
from utils.values import Counts, ListOf, Section

Size = Annotated[int, Field(ge=1, le=2**14)]


class AutoencoderSizes(Section):
    """The arguments of AutoencoderKL on which its weights and its output depend."""

    in_channels: Literal[1, 3]
    out_channels: Literal[1, 3]
    down_block_types: ListOf[Literal["DownEncoderBlock2D"]]
    up_block_types: ListOf[Literal["UpDecoderBlock2D"]]
    block_out_channels: Annotated[Counts, Field(min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Field(ge=1, le=64)]
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: Size
    norm_num_groups: Size = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "AutoencoderSizes":
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(f"block_out_channels: {levels}, but another number of block types")
        if self.in_channels != self.out_channels:
            raise ValueError(f"in_channels: {self.in_channels}, out_channels: {self.out_channels}")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups: {self.norm_num_groups} does not divide all block_out_channels"
            )
        return self

    @property
    def downsampling(self) -> int:
        """How many times smaller than an image its latents are, in height and in width."""
        return int(2 ** (len(self.block_out_channels) - 1))


class Autoencoder(nn.Module):
    """Maps images in [-1, 1] to a normal distribution of latents, and latents to images.

    Raises InputError without diffusers.
    """

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise InputError(
                "codec.name: autoencoder needs diffusers: pip install diffusers"
            ) from None
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        self.kl: Any = AutoencoderKL(**sizes.model_dump())

    def moments(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b l m n"], Float[Tensor, "b l m n"]]:
        """Returns mean and log variance of the latents of images in [-1, 1]."""
        posterior = self.kl.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Float[Tensor, "b l m n"]) -> Float[Tensor, "b c h w"]:
        """Returns the images of latents, about in [-1, 1]."""
        return self.kl.decode(z).sample

    def forward(
        self, x: Float[Tensor, "b c h w"], eps: Float[Tensor, "b l m n"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b l m n"], Float[Tensor, "b l m n"]]:
        """Returns the images of the latents mean + std eps, their mean and their log variance."""
        mean, logvar = self.moments(x)
        return self.decode(mean + torch.exp(0.5 * logvar) * eps), mean, logvar
