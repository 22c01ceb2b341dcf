"""The config section of the UNet."""

import math
from typing import Annotated, Literal

from pydantic import Field

from utils.values import Counts, Fraction, ListOf, Section


class UNetSection(Section):
    """The UNet's sizes (models/unet.py). guidance: whether the guidance weight is an input.

    input_features: n for each sin(2^n pi z) and cos(2^n pi z) that is an input beside z.
    """

    name: Literal["unet"] = "unet"
    channels: Annotated[int, Field(ge=4, le=2**14)] = 128
    embedding_channels: Annotated[int, Field(ge=1, le=2**16)] | None = None
    channel_multipliers: Annotated[Counts, Field(min_length=1)] = (1, 2, 2, 2)
    blocks_per_level: Annotated[int, Field(ge=1, le=64)] = 2
    attention_resolutions: Counts = (16,)
    attention_heads: Annotated[int, Field(ge=1, le=1024)] = 2
    attention_head_dim: Annotated[int, Field(ge=1, le=4096)] | None = None
    dropout: Fraction = 0.1
    resample: Literal["block", "conv", "plain"] = "block"
    patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    num_classes: Annotated[int, Field(ge=1, le=2**20)] | None = None
    guidance: bool = False
    input_features: ListOf[Annotated[int, Field(ge=0, le=16)]] = ()

    def misfit(self, image_size: int, where: str) -> str | None:
        """Returns why the network cannot take images of this size, or None if it can.

        where: the dotted key of this section, for the message.
        """
        divisor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        if image_size % divisor:
            return (
                f"data.image_size: {image_size} is not divisible by {divisor}, which "
                f"{where}.patch_size and the {len(self.channel_multipliers)} entries of "
                f"{where}.channel_multipliers need"
            )
        levels = range(len(self.channel_multipliers))
        resolutions = [image_size // self.patch_size >> level for level in levels]
        for resolution in self.attention_resolutions:
            if resolution not in resolutions:
                return (
                    f"{where}.attention_resolutions: {resolution} does not occur; take any of "
                    f"{', '.join(map(str, resolutions))}"
                )
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        last, before = widths[-1], [self.channels, *widths][-2]
        # What blocks take at the lowest resolution: on the way down, and joined on the way up.
        for width in (last, before, 2 * last, last + before) if resolutions[-1] == 1 else ():
            if width == math.gcd(32, width):
                return (
                    f"{where}.channel_multipliers: {len(widths)} entries leave one pixel, which "
                    f"GroupNorm cannot normalise with {width} channels, one a group; take fewer"
                )
        with_attention = {
            width
            for width, resolution in zip(widths, resolutions, strict=True)
            if resolution in self.attention_resolutions
        } | {widths[-1]}  # the middle block always attends
        key = "attention_head_dim" if self.attention_head_dim else "attention_heads"
        value = self.attention_head_dim or self.attention_heads
        for width in sorted(with_attention):
            if width % value:
                return (
                    f"{where}.{key}: {value} does not divide the {width} channels that attention "
                    "works on"
                )
        return None
