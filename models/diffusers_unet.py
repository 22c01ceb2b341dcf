"""UNet2DModel of the diffusers library as a network, which counts noise levels instead of times.

Needs the package diffusers, which is imported only when such a network is built.
"""

import json
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from diffusion.schedule import cosine_logsnr
from utils.command import InputError
from utils.values import Count, Fraction, Section

GIVEN = ("sample_size", "in_channels", "out_channels", "dropout")  # by other keys of the config
TIME_INPUTS = ("positional", "learned")
MOST = 64  # blocks, and layers in a block


class DiffusersUNetSection(Section):
    """The arguments of UNet2DModel (config), as in unet/config.json, but for sizes and dropout.

    num_train_timesteps: the number of noise levels that it counts. num_classes: as many rows of its
    num_class_embeds are classes; if it has one row more, that one means no class. guidance: never.
    """

    name: Literal["diffusers_unet"]
    config: dict[str, Any]
    num_train_timesteps: Annotated[int, Field(ge=1, le=2**16)]
    num_classes: Count | None = None
    dropout: Fraction = 0.0
    guidance: bool = False

    @property
    def knows_no_class(self) -> bool:
        """Whether it takes images without a class."""
        return self.num_classes is None or self.config.get("num_class_embeds") != self.num_classes

    def misfit(self, image_size: int, where: str) -> str | None:
        """Returns why the network cannot be built or take images of this size, or None if it can.

        where: the dotted key of this section, for the message.
        """
        config, rows = self.config, self.config.get("num_class_embeds")
        if self.guidance:
            return (
                f"{where}.guidance: a diffusers_unet takes no guidance weight; take another network"
            )
        if given := [key for key in GIVEN if key in config]:
            return f"{where}.config: {given[0]} follows from other keys of the config; leave it out"
        if config.get("time_embedding_type", "positional") not in TIME_INPUTS:
            return (
                f"{where}.config: time_embedding_type {config['time_embedding_type']!r} is not one "
                f"of {', '.join(TIME_INPUTS)}"
            )
        if config.get("class_embed_type") is not None:
            return f"{where}.config: class_embed_type: only null is taken, with num_class_embeds"
        if rows != self.num_classes and (self.num_classes is None or rows != self.num_classes + 1):
            return (
                f"{where}.num_classes: {self.num_classes}, but its num_class_embeds is {rows}; "
                "take the same, or one less if the last row means no class"
            )
        times = config.get("num_train_timesteps")
        learned = config.get("time_embedding_type") == "learned"
        if learned and isinstance(times, int) and times < self.num_train_timesteps:
            return (
                f"{where}.config: num_train_timesteps: {times} learned time embeddings for "
                f"{self.num_train_timesteps} noise levels"
            )
        layers = config.get("layers_per_block", 2)
        if not (type(layers) is int and 1 <= layers <= MOST):
            return f"{where}.config: layers_per_block: not a whole number from 1 to {MOST}"
        if long := [k for k, v in config.items() if isinstance(v, list) and len(v) > MOST]:
            return f"{where}.config: {long[0]}: more than {MOST} values"
        wrong = _failure(self.model_dump_json(exclude={"name"}), image_size)
        return f"{where}.{wrong}" if wrong else None


class DiffusersUNet(nn.Module):
    """A UNet2DModel whose time input is the number i of the noise level in a table.

    The table has the logsnr of each i = 0 .. T-1, from least to most noise. It is a buffer, so that
    it is in every checkpoint; until weights are loaded it is that of the cosine schedule. Any other
    logsnr counts as the nearest one in the table.
    """

    table: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        output_channels: int,
        config: dict[str, Any],
        num_train_timesteps: int,
        num_classes: int | None,
        dropout: float,
        guidance: bool = False,
    ) -> None:
        """Raises InputError if diffusers is not installed."""
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise InputError("diffusers_unet needs diffusers: pip install diffusers") from None
        t = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        self.register_buffer("table", cosine_logsnr(t))
        self.num_classes = num_classes
        self.knows_no_class = config.get("num_class_embeds") != num_classes
        self.unet: Any = UNet2DModel(
            **config,
            sample_size=image_size,
            in_channels=image_channels,
            out_channels=output_channels,
            dropout=dropout,
        )

    def forward(
        self,
        z: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
        guidance: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Returns the network's output for noisy images z at noise levels logsnr.

        label: their classes, -1 for none. Raises ValueError for a label or guidance weight that the
        network does not take, InputError for -1 if there is no row for it.
        """
        if guidance is not None:
            raise ValueError("this network takes no guidance weight")
        if self.num_classes is None:
            if label is not None:
                raise ValueError("a label was given to a network without classes")
        else:
            label = self._rows(z, label)
        i = (logsnr[:, None] - self.table).abs().argmin(dim=1)
        return self.unet(z, i, class_labels=label).sample

    def _rows(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Returns the rows of the class embedding."""
        if label is None:
            label = torch.full((len(z),), -1, device=z.device)
        # Recorded updates and exported graphs cannot ask; a config that drops labels is refused.
        recording = torch.compiler.is_exporting() or (
            label.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        asked = not (self.knows_no_class or recording)
        if asked and bool((label < 0).any()):
            raise InputError(
                f"this network has {self.num_classes} classes and none for no class; give each "
                "image one, without guidance"
            )
        return label.where(label >= 0, torch.full_like(label, self.num_classes or 0))


@lru_cache(maxsize=16)  # a config is checked more than once in a run
def _failure(section: str, image_size: int) -> str | None:
    """Returns how building the network, and calling it, fails; without memory or arithmetic.

    section: its values but the name, as JSON.
    """
    values = json.loads(section)
    try:
        with torch.device("meta"):
            network = DiffusersUNet(
                image_size=image_size, image_channels=1, output_channels=1, **values
            )
            z = torch.zeros(1, 1, image_size, image_size)
            first = torch.zeros(1, dtype=torch.long)
            network.unet(z, first, None if values["num_classes"] is None else first)
    except InputError as error:
        return f"name: {error}"
    except Exception as error:  # it raises anything for what does not fit together
        said = " ".join(str(error).split())[:200]
        return f"config: no UNet2DModel for images of {image_size} pixels: {said}"
    return None
