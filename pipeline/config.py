"""The config of a run: one YAML file -> frozen, checked values (see sections.py)."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, model_validator

from pipeline.codec_sections import (
    NOT_CLIPPED,
    AutoencoderConfig,
    AutoencoderSection,
    Codecs,
    PixelsSection,
)
from pipeline.sections import PER_STAGE as PER_STAGE
from pipeline.sections import DataConfig as DataConfig
from pipeline.sections import DiffusionConfig, EngineConfig, SamplingConfig, TrainingConfig
from pipeline.sections import DistillationConfig as DistillationConfig
from pipeline.sections import ModelConfig as ModelConfig
from pipeline.sections import Recipe as Recipe
from pipeline.values import GridChoice as GridChoice
from pipeline.values import PathName, Section
from utils.command import InputError
from utils.strict_yaml import override, read_yaml


class Config(Section):
    """The config of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: PathName | None = None
    data: DataConfig = DataConfig()
    codec: Annotated[Codecs, Field(discriminator="name")] = PixelsSection()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig = DistillationConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        if wrong := self.codec.misfit(self.data.image_size):
            raise ValueError(wrong)
        if self.sampling.clip and self.codec.name != "pixels":
            raise ValueError(f"sampling.clip: true, but {NOT_CLIPPED} (false)")
        student = self.distillation.student
        for where, model in (("model", self.model), ("distillation.student", student)):
            if model is not None and (wrong := self._misfit(model, where)):
                raise ValueError(wrong)
        classes = self.model.num_classes
        if self.training.label_dropout and classes is None:
            raise ValueError(
                f"training.label_dropout: {self.training.label_dropout} needs labels; set "
                "model.num_classes, or leave it at 0"
            )
        if student is not None and student.num_classes != classes:
            raise ValueError(
                f"distillation.student.num_classes: {student.num_classes}, but the teacher has "
                f"{classes}; take the same"
            )
        if self.distillation.guidance is not None and classes is None:
            raise ValueError(
                "distillation.guidance: needs a teacher that is conditional (model.num_classes)"
            )
        return self

    def _misfit(self, model: ModelConfig, where: str) -> str | None:
        """Returns why a network cannot take what the codec gives it, or None if it can."""
        if self.codec.name == "pixels":
            return model.misfit(self.data.image_size, where)
        if self.codec.digest is None:  # known when the autoencoder's file has been read
            return None
        _, size, _ = self.codec.shape(self.data.image_size, self.data.channels)
        wrong = model.misfit(size, where)
        return wrong and f"codec: its latents are images of {size}x{size} to the network; {wrong}"


SECTIONS = [name for name, f in Config.model_fields.items() if isinstance(f.default, Section)]
UNIONS = {"codec": {"pixels": PixelsSection, "autoencoder": AutoencoderSection}}


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


def explain(error: ValidationError) -> str:
    """Describes the first error in one line: the key, what is wrong, what would be right."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    tag = None
    for one in error.errors():
        if one["loc"][:1] == ("codec",) and len(one["loc"]) > 1:  # (section, its name, key)
            one["loc"], tag = ("codec", *one["loc"][2:]), one["loc"][1]
        by_key.setdefault(tuple(map(str, one["loc"][:2])), []).append(one)
    # A value that may be a number or a list has an error for each; the deeper one says more.
    first = max(next(iter(by_key.values())), key=lambda one: len(one["loc"]))
    depth = 3 if first["loc"][:2] == ("distillation", "student") else 2  # a section in a section
    path = [str(part) for part in first["loc"][:depth]]
    path += [str(part) for part in first["loc"][depth:] if isinstance(part, int)]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + _nearest_key(path, tag)
    elif first["type"].startswith("union_tag"):
        path.append("name")
        message = f"take one of {', '.join(UNIONS[path[0]])}"
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] != "value_error" or len(path) > 1:
        # a constraint between keys names them and their values itself
        message = f"{message[0].lower()}{message[1:]} (it is {_shortened(first['input'])})"
    key = ".".join(path)
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    return (f"{key}: " if key else "") + message + more


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(path: list[str], tag: Any) -> str:
    section: Any = Config
    for part in path[:-1]:
        if part in UNIONS:
            section = UNIONS[part][tag]
            continue
        section = section.model_fields[part].annotation
        section = section if hasattr(section, "model_fields") else get_args(section)[0]  # X | None
    keys = list(section.model_fields)
    near = difflib.get_close_matches(path[-1], keys, 1)
    if near:
        return f"; did you mean {near[0]}?"
    home = [
        f"{name}.{path[-1]}"
        for name, field in Config.model_fields.items()
        if path[-1] in getattr(field.annotation, "model_fields", {})
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
        names = list(dict.fromkeys([*left, *right]))  # of an other codec they may be other keys
        keys += [f"{section}.{key}" for key in names if left.get(key) != right.get(key)]
    return keys
