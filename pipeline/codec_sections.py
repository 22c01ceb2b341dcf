"""What a config says of its codec (pixels or latents), and of training an autoencoder."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Tag

from models.autoencoder import AutoencoderSizes
from pipeline.values import PathName
from utils.values import Counts, Section, by_name

NOT_CLIPPED = "latents have no fixed range that they could be clipped to; leave it off"
Shape = tuple[int, int, int]
"""(C, H, W) of one image, or of its latents."""


class PixelsSection(Section):
    """The model works on pixels in [-1, 1]."""

    name: Literal["pixels"] = "pixels"

    @property
    def identity(self) -> str | None:
        """The digest of the weights that it depends on: there are none."""
        return None

    def shape(self, image_size: int, channels: int) -> Shape:
        """Returns (C, H, W) of what the model works on."""
        return channels, image_size, image_size

    def misfit(self, image_size: int) -> str | None:
        """Returns why it cannot encode images of this size: it always can."""
        return None

    def found_from(self, folder: Path) -> "PixelsSection":
        """Returns the section as a checkpoint in the folder has it: there is no file to find."""
        return self


class AutoencoderSection(Section):
    """The model works on the latents of an autoencoder, scaled to mean 0 and variance 1.

    file: of tools/train_autoencoder.py, or a folder in the format of diffusers. latent_channels,
    downsampling, digest: null for those of the file, which a run fills in (pipeline/latents.py).
    """

    name: Literal["autoencoder"]
    file: PathName
    latent_channels: Annotated[int, Field(ge=1, le=2**14)] | None = None
    downsampling: Annotated[int, Field(ge=1, le=2**15)] | None = None
    digest: Annotated[str, Field(pattern="[0-9a-f]{64}", max_length=64)] | None = None

    @property
    def identity(self) -> str | None:
        """The digest of the autoencoder; None before its file has been read."""
        return self.digest

    def shape(self, image_size: int, channels: int) -> Shape:
        """Returns (C, H, W) of what the model works on."""
        if self.latent_channels is None or self.downsampling is None:
            raise ValueError(f"{self.file}: has not been read yet")
        size = image_size // self.downsampling
        return self.latent_channels, size, size

    def misfit(self, image_size: int) -> str | None:
        """Returns why it cannot encode images of this size, or None if it can."""
        if self.downsampling is None or image_size % self.downsampling == 0:
            return None
        return (
            f"data.image_size: {image_size} is not divisible by the downsampling of "
            f"{self.downsampling} of the autoencoder (codec.file)"
        )

    def found_from(self, folder: Path) -> "AutoencoderSection":
        """Returns the section as a checkpoint in the folder has it.

        The autoencoder's file is looked for where the section says, then in the folder.
        """
        beside = folder / Path(self.file).name
        if Path(self.file).exists() or not beside.exists():
            return self
        return self.model_copy(update={"file": str(beside)})


CODEC_SECTIONS: dict[str, type[Section]] = {
    "pixels": PixelsSection,
    "autoencoder": AutoencoderSection,
}


CodecSection = Annotated[
    Annotated[PixelsSection, Tag("pixels")] | Annotated[AutoencoderSection, Tag("autoencoder")],
    by_name("pixels"),
]


class AutoencoderConfig(Section):
    """The autoencoder that tools/train_autoencoder.py trains; its recipe is the section training.

    channels: of the levels; each level but the first halves height and width. loss: of the images
    that it gives back, absolute (l1) or squared (l2) differences. kl_weight: of the divergence of
    the latents from N(0, 1), both terms per pixel.
    """

    channels: Annotated[Counts, Field(min_length=1, max_length=16)] = (32, 64, 64)
    blocks_per_level: Annotated[int, Field(ge=1, le=64)] = 1
    latent_channels: Annotated[int, Field(ge=1, le=2**10)] = 4
    loss: Literal["l1", "l2"] = "l1"
    kl_weight: Annotated[float, Field(ge=0.0)] = 1.0e-3

    def sizes(self, channels: int) -> AutoencoderSizes:
        """Returns the sizes of the network. channels: of the images."""
        levels = len(self.channels)
        return AutoencoderSizes.model_validate(
            {
                "in_channels": channels,
                "out_channels": channels,
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels,
                "block_out_channels": self.channels,
                "layers_per_block": self.blocks_per_level,
                "latent_channels": self.latent_channels,
                "norm_num_groups": math.gcd(32, *self.channels),
            }
        )
