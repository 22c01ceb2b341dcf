"""The config of a run: one YAML file -> frozen, checked values (see sections.py)."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from models.diffusers_unet import DiffusersUNetSection
from models.networks import NETWORKS, NetworkSection
from models.unet_section import UNetSection
from pipeline.codec_sections import (
    CODEC_SECTIONS,
    NOT_CLIPPED,
    AutoencoderConfig,
    CodecSection,
    PixelsSection,
)
from pipeline.sections import (
    DataConfig,
    DiffusionConfig,
    DistillationConfig,
    EngineConfig,
    SamplingConfig,
    TrainingConfig,
)
from pipeline.values import PathName
from utils.command import InputError
from utils.strict_yaml import override, read_yaml
from utils.values import Section


class Config(Section):
    """The config of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: PathName | None = None
    data: DataConfig = DataConfig()
    codec: CodecSection = PixelsSection()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: NetworkSection = UNetSection()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig = DistillationConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        if wrong := self.codec.misfit(self.data.image_size):
            raise ValueError(wrong)
        for section in ("sampling", "diffusion"):
            if getattr(self, section).clip and self.codec.name != "pixels":
                raise ValueError(f"{section}.clip: true, but {NOT_CLIPPED} (false)")
        if self.diffusion.clip and not self.sampling.clip:
            raise ValueError("sampling.clip: false, but diffusion.clip: true clips everywhere")
        student = self.distillation.student
        for where, model in (("model", self.model), ("distillation.student", student)):
            if model is not None and (wrong := self.misfit(model, where)):
                raise ValueError(wrong)
        classes = self.model.num_classes
        if self.training.label_dropout and classes is None:
            raise ValueError(
                f"training.label_dropout: {self.training.label_dropout} needs labels; set "
                "model.num_classes, or leave it at 0"
            )
        no_row = isinstance(self.model, DiffusersUNetSection) and not self.model.knows_no_class
        if self.training.label_dropout and no_row:
            raise ValueError(
                f"training.label_dropout: {self.training.label_dropout}, but this network has no "
                "input for images without a class (model.config.num_class_embeds); leave it at 0"
            )
        if student is not None and student.num_classes != classes:
            raise ValueError(
                f"distillation.student.num_classes: {student.num_classes}, but the teacher has "
                f"{classes}; take the same"
            )
        if student is not None and student.guidance:
            raise ValueError(
                "distillation.student.guidance: follows from distillation.guidance; leave it out"
            )
        if self.distillation.guidance is not None and classes is None:
            raise ValueError(
                "distillation.guidance: needs a teacher that is conditional (model.num_classes)"
            )
        return self

    def misfit(self, model: NetworkSection, where: str) -> str | None:
        """Returns why a network cannot take what the codec gives it, or None if it can."""
        if self.codec.name == "pixels":
            return model.misfit(self.data.image_size, where)
        if self.codec.digest is None:  # the autoencoder's file has not been read yet
            return None
        _, size, _ = self.codec.shape(self.data.image_size, self.data.channels)
        wrong = model.misfit(size, where)
        return wrong and f"codec: its latents are images of {size}x{size} to the network; {wrong}"


SECTIONS = [name for name in Config.model_fields if isinstance(getattr(Config(), name), Section)]
# The sections of which a config names one of several, each with its own keys.
_NETWORK_SECTIONS = {name: network.section for name, network in NETWORKS.items()}
NAMED: dict[str, Mapping[str, type[Section]]] = {
    "codec": CODEC_SECTIONS,
    "model": _NETWORK_SECTIONS,
    "distillation.student": _NETWORK_SECTIONS,
}


# --- from files and command lines ---------------------------------------------------------------


def make_config(values: Mapping[str, Any], where: str) -> Config:
    """Returns the checked config. Raises InputError with where, the key and what is wrong.

    A section that is null, because all of its keys are commented out, has its defaults.
    """
    given = {k: v for k, v in values.items() if v is not None or k not in SECTIONS}
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the config in a YAML file, with the overrides (key=value) applied."""
    where = f"{path} with --set" if overrides else str(path)
    return make_config(override(read_yaml(path), overrides), where)


def explain(error: ValidationError, depth: int = 2) -> str:
    """Describes the first error in one line: the key, what is wrong, what would be right.

    depth: how many names a key has, at most; 2 for a key of a section.
    """
    by_key: dict[tuple[str, ...], list[Any]] = {}
    errors: list[dict[str, Any]] = [{**one} for one in error.errors()]
    for one in errors:
        one["loc"], one["section"] = _untagged(one["loc"])
        by_key.setdefault(tuple(map(str, one["loc"][:2])), []).append(one)
    # A value that may be a number or a list has an error for each; the deeper one says more.
    first = max(next(iter(by_key.values())), key=lambda one: len(one["loc"]))
    if first["loc"][:2] == ("distillation", "student"):
        depth = 3  # a section in a section
    path = [str(part) for part in first["loc"][:depth]]
    path += [str(part) for part in first["loc"][depth:] if isinstance(part, int)]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        message = f"{first['ctx']['tag']!r} is not one of {', '.join(NAMED['.'.join(path)])}"
        path.append("name")
    elif first["type"] == "union_tag_not_found":
        message = f"not a section of keys and values (it is {_shortened(first['input'])})"
    elif first["type"] == "extra_forbidden":
        message = "unknown key" + _nearest_key(path, first["section"])
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] != "value_error" or len(path) > 1:
        # a constraint between keys names them and their values itself
        message = f"{message[0].lower()}{message[1:]} (it is {_shortened(first['input'])})"
    key = ".".join(path)
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    return (f"{key}: " if key else "") + message + more


def _untagged(where: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Returns the location without the name of a network or codec, and the section of that name.

    pydantic adds the name after the key of a section of NAMED.
    """
    depth = 2 if where[:2] == ("distillation", "student") else 1
    named = NAMED.get(".".join(map(str, where[:depth])), {})
    name = str(where[depth]) if len(where) > depth else ""
    if name not in named:
        return where, None
    return where[:depth] + where[depth + 1 :], named[name]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(path: list[str], named: Any) -> str:
    section: Any = Config
    for part in path[:-1]:
        where = section.model_fields[part].annotation
        section = where if hasattr(where, "model_fields") else named
    keys = list(section.model_fields)
    near = difflib.get_close_matches(path[-1], keys, 1)
    if near:
        return f"; did you mean {near[0]}?"
    home = [
        f"{name}.{path[-1]}"
        for name in SECTIONS
        if path[-1] in type(getattr(Config(), name)).model_fields
    ]
    return f"; did you mean {home[0]}?" if home else f"; known: {', '.join(keys)}"


def differences(a: Config, b: Config, sections: Sequence[str]) -> list[str]:
    """Returns the dotted keys of these sections in which two configs differ."""
    keys = []
    for section in sections:
        left, right = a.model_dump()[section], b.model_dump()[section]
        if not isinstance(left, dict):
            keys += [section] if left != right else []
            continue
        names = dict.fromkeys([*left, *right])  # two networks or codecs have other keys
        keys += [f"{section}.{key}" for key in names if left.get(key) != right.get(key)]
    return keys
