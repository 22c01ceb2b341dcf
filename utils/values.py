"""Checked values: the base class of a config's sections, and types of numbers and lists."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field


class Section(BaseModel):
    """Frozen; refuses unknown keys and converts nothing: true is no number, a number no string."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Upper limits only catch typing errors, before they run out of memory.
T = TypeVar("T")
AsTuple = BeforeValidator(_as_tuple)
ListOf = Annotated[tuple[T, ...], AsTuple]
Count = Annotated[int, Field(ge=1, le=2**31)]
Counts = Annotated[ListOf[Annotated[int, Field(ge=1, le=2**20)]], Field(max_length=64)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def by_name(default: str) -> Discriminator:
    """Returns what chooses among sections by their key name. default: where none is given."""

    def name(section: Any) -> Any:
        if not isinstance(section, dict):
            return getattr(section, "name", None)
        given = section.get("name", default)
        return given if isinstance(given, str) else repr(given)

    return Discriminator(name)
