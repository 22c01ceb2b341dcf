"""The networks that a config can name, each with its own checked section.

Every network is called as (z, logsnr, label=None, guidance=None) -> output. To add one: a section
(name, dropout, num_classes, guidance, its sizes, misfit), a class that takes the section's values
as arguments, an entry in NETWORKS and in NetworkSection.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import Tag
from torch import nn

from models.diffusers_unet import DiffusersUNet, DiffusersUNetSection
from models.dit import DiT, DiTSection
from models.unet import UNet
from models.unet_section import UNetSection
from utils.values import Section, by_name


class Network(NamedTuple):
    """A network's section, and its class.

    build: takes image_size, image_channels, output_channels, and the section's values but its name.
    """

    section: type[Section]
    build: Callable[..., nn.Module]


NETWORKS = {
    "unet": Network(UNetSection, UNet),
    "dit": Network(DiTSection, DiT),
    "diffusers_unet": Network(DiffusersUNetSection, DiffusersUNet),
}


NetworkSection = Annotated[
    Annotated[UNetSection, Tag("unet")]
    | Annotated[DiTSection, Tag("dit")]
    | Annotated[DiffusersUNetSection, Tag("diffusers_unet")],
    by_name("unet"),
]
