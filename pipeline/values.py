"""The types of a config's values that are names of the project's tables, and a few ranges."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from diffusion.distillation import METHODS
from diffusion.gaussian import OUTPUT_TYPES
from diffusion.losses import ADVERSARIAL, LOSSES, SQUARED_ERRORS
from diffusion.samplers import make_sampler
from diffusion.schedule import SCHEDULES
from pipeline.data import DATASETS
from utils.values import AsTuple, ListOf


def one_of(names: Collection[str]) -> AfterValidator:
    """Returns a validator: the string must be one of the names."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is not one of {', '.join(names)}")
        return name

    return AfterValidator(check)


def _sampler_name(name: str) -> str:
    make_sampler(name)  # raises ValueError
    return name


def _path(text: str) -> str:
    if "\0" in text or not text.isprintable() or not text.strip():
        raise ValueError("not the name of a file or folder")
    return text


TABLE = "table"
"""In the place of a schedule: the levels are those of the checkpoint's grid, not of a formula."""

Rate = Annotated[float, Field(gt=0.0, le=1000.0)]
Exponent = Annotated[float, Field(ge=1.0, le=10.0)]
Time = Annotated[float, Field(ge=0.0, le=1.0)]
GridChoice = Literal["uniform", "adaptive"] | ListOf[Time]
GuidanceWeight = Annotated[float, Field(ge=0.0, le=100.0)]
Range = Annotated[tuple[GuidanceWeight, GuidanceWeight], AsTuple]
PathName = Annotated[str, AfterValidator(_path)]
SamplerName = Annotated[str, AfterValidator(_sampler_name)]
DatasetName = Annotated[str, one_of(DATASETS)]
OutputTypeName = Annotated[str, one_of(OUTPUT_TYPES)]
ScheduleName = Annotated[str, one_of([*SCHEDULES, TABLE])]
LossWeightName = Annotated[str, one_of(SQUARED_ERRORS)]
LossName = Annotated[str, one_of((*LOSSES, ADVERSARIAL))]
MethodName = Annotated[str, one_of(METHODS)]
