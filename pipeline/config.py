"""The config: one YAML file -> frozen, checked values. Every key is used; every constraint is here.

The defaults are the tutorial's recipe (configs/ddpm_32x32_v_continuous.yaml), except for
model.resample: a config without that key keeps the network that it has always had.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from diffusion.gaussian import OUTPUT_TYPES
from diffusion.losses import LOSS_WEIGHTS
from diffusion.samplers import make_sampler
from diffusion.schedule import SCHEDULES
from pipeline.data import DATASETS
from utils.command import InputError
from utils.files import require_regular_file

# --- kinds of values ----------------------------------------------------------------------------


def one_of(names: Mapping[str, Any]) -> AfterValidator:
    """Checks that a string is a key of the table."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is not one of {', '.join(names)}")
        return name

    return AfterValidator(check)


def _sampler_name(name: str) -> str:
    make_sampler(name)
    return name


def _path(text: str) -> str:
    if "\0" in text or not text.isprintable() or not text.strip():
        raise ValueError("not the name of a file or folder")
    return text


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Upper limits only catch slips of the finger, before they become an out-of-memory error.
Count = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
PathName = Annotated[str, AfterValidator(_path)]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**20)], ...],
    BeforeValidator(_as_tuple),
    Field(max_length=64),
]
DatasetName = Annotated[str, one_of(DATASETS)]
OutputTypeName = Annotated[str, one_of(OUTPUT_TYPES)]
ScheduleName = Annotated[str, one_of(SCHEDULES)]
LossWeightName = Annotated[str, one_of(LOSS_WEIGHTS)]
SamplerName = Annotated[str, AfterValidator(_sampler_name)]
CountPerStage = Count | Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)]
PositivePerStage = Positive | Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]
Exponent = Annotated[float, Field(ge=1.0, le=10.0)]
ExponentPerStage = Exponent | Annotated[tuple[Exponent, ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """Frozen, no unknown keys, no conversions: true is no number, a number no string."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Recipe(Section):
    """What training and distillation share. accumulate: in how many parts a batch is done."""

    batch_size: Count = 128
    accumulate: Count = 1
    gradient_clip: Positive | None = 1.0
    checkpoint_every: Count = 1000

    @model_validator(mode="after")
    def _batch_can_be_shared(self) -> "Recipe":
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: {self.accumulate} parts of a batch_size of {self.batch_size}; "
                "take at most as many as there are images"
            )
        return self


class DataConfig(Section):
    """The images. root: the folder that holds <name>/; of an image_folder, the images' own."""

    name: DatasetName = "mnist"
    root: PathName = "data"
    image_size: Annotated[int, Field(ge=1, le=1024)] = 32
    channels: Literal[1, 3] = 1
    horizontal_flip: bool = False
    workers: Annotated[int, Field(ge=0, le=64)] = 2


class ModelConfig(Section):
    """The UNet's sizes (models/unet.py)."""

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


class DiffusionConfig(Section):
    """The diffusion process and what the network predicts.

    logsnr_min, logsnr_max: within [-20, 20], to which the network's time input is clipped
    (time_features in models/layers.py): it cannot tell the noise levels beyond from one another.
    """

    prediction: OutputTypeName = "v"
    schedule: ScheduleName = "cosine"
    logsnr_min: Annotated[float, Field(ge=-20.0, lt=0.0)] = -20.0
    logsnr_max: Annotated[float, Field(gt=0.0, le=20.0)] = 20.0
    loss_weight: LossWeightName = "snr_plus_one"


class TrainingConfig(Recipe):
    """Training the base model.

    learning_rate_decay: constant after the warm-up, or linear to 0. times: uniform in [0, 1], or
    stratified: one in each of batch_size equal parts of it, which makes the gradient less noisy.
    label_dropout: the share of images shown without their class, for classifier-free guidance.
    keep_checkpoints: how many of the newest stay, null for all; multiples of milestone_every do.
    """

    updates: Count = 10_000
    learning_rate: Positive = 2.0e-4
    learning_rate_decay: Literal["none", "linear"] = "none"
    times: Literal["uniform", "stratified"] = "uniform"
    warmup: Annotated[int, Field(ge=0, le=2**31)] = 1000
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    ema_decay: Fraction = 0.9999
    label_dropout: Fraction = 0.0
    keep_checkpoints: Annotated[int, Field(ge=2, le=2**31)] | None = None
    milestone_every: Count | None = None


class Stage(NamedTuple):
    """What differs from stage to stage. learning_rate: the initial one."""

    updates: int
    learning_rate: float
    time_exponent: float


class DistillationConfig(Recipe):
    """The ladder. first_steps: the FIRST student's steps; each of the iterations halves them.

    updates_per_stage, learning_rate, time_exponent: one number, or a list with one for each stage.
    The rate falls to 0 within every stage. time_exponent: 1 draws all steps alike, as the paper
    does; p draws the noisier ones more often, step i of N with ((i + 1) / N)^p - (i / N)^p.
    """

    first_steps: Annotated[int, Field(ge=1, le=2**19)] = 512
    iterations: Annotated[int, Field(ge=1, le=31)] = 7
    updates_per_stage: CountPerStage = 5000
    learning_rate: PositivePerStage = 1.0e-4
    time_exponent: ExponentPerStage = 1.0
    loss_weight: LossWeightName = "snr_trunc"

    @model_validator(mode="after")
    def _ladder_exists(self) -> "DistillationConfig":
        self.ladder()
        for key in ("updates_per_stage", "learning_rate", "time_exponent"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != self.iterations:
                raise ValueError(
                    f"{key} lists {len(value)} stages, but iterations is {self.iterations}: "
                    "give one number, or one for each stage"
                )
        return self

    def ladder(self) -> tuple[int, ...]:
        """The students' step counts, e.g. (512, 256, .., 8). Raises ValueError if one is odd."""
        steps = [self.first_steps]
        for stage in range(1, self.iterations):
            if steps[-1] % 2:
                raise ValueError(
                    f"first_steps {self.first_steps} cannot be halved {self.iterations - 1} times: "
                    f"stage {stage} has {steps[-1]} steps; take a multiple of "
                    f"{2 ** (self.iterations - 1)}, or at most {stage} iterations"
                )
            steps.append(steps[-1] // 2)
        return tuple(steps)

    def stage(self, position: int) -> Stage:
        """A stage's own recipe, counted from 0."""

        def own(value: Any) -> Any:
            return value[position] if isinstance(value, tuple) else value

        return Stage(own(self.updates_per_stage), own(self.learning_rate), own(self.time_exponent))

    def updates_after(self, position: int) -> int:
        """Of all stages that follow this one."""
        return sum(self.stage(n).updates for n in range(position + 1, self.iterations))


class SamplingConfig(Section):
    """How the pictures beside the checkpoints are drawn. steps: of a base model."""

    steps: Annotated[int, Field(ge=1, le=2**20)] = 1024
    sampler: SamplerName = "ddim"
    clip: bool = True
    grid: Annotated[int, Field(ge=1, le=1024)] = 64


class EngineConfig(Section):
    """How fast, not what. precision: of the networks (autocast); tf32: of float32 on GPUs.

    compile: torch.compile, which pays on GPUs; on a CPU it costs a minute and gains little.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    tf32: bool = True


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: PathName | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig = DistillationConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        model, size = self.model, self.data.image_size
        divisor = model.patch_size * 2 ** (len(model.channel_multipliers) - 1)
        if size % divisor:
            raise ValueError(
                f"data.image_size: {size} is not divisible by {divisor}, which model.patch_size "
                f"and the {len(model.channel_multipliers)} levels of model.channel_multipliers ask"
            )
        levels = range(len(model.channel_multipliers))
        resolutions = [size // model.patch_size >> level for level in levels]
        for resolution in model.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"model.attention_resolutions: {resolution} does not occur; the levels have "
                    f"{', '.join(map(str, resolutions))}"
                )
        if self.training.label_dropout and model.num_classes is None:
            raise ValueError(
                f"training.label_dropout: {self.training.label_dropout} of no labels; set "
                "model.num_classes, or leave it at 0"
            )
        widths = [model.channels * multiplier for multiplier in model.channel_multipliers]
        if resolutions[-1] == 1 and widths[-1] == math.gcd(32, widths[-1]):
            raise ValueError(
                f"model.channel_multipliers: {len(widths)} levels leave one pixel, which GroupNorm "
                f"cannot normalise with {widths[-1]} channels, one a group; take fewer levels"
            )
        with_attention = {
            width
            for width, resolution in zip(widths, resolutions, strict=True)
            if resolution in model.attention_resolutions
        } | {widths[-1]}  # the middle block always attends
        key = "attention_head_dim" if model.attention_head_dim else "attention_heads"
        value = model.attention_head_dim or model.attention_heads
        for width in sorted(with_attention):
            if width % value:
                raise ValueError(
                    f"model.{key}: {value} does not divide the {width} channels that attention has"
                )
        return self


SECTIONS = [
    name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")
]


# --- YAML ---------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """YAML with the 1.2 core schema's scalars, no aliases, and no key given twice."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases, by which a short file can name a very large value."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not taken", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is given twice."""
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else str(key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), _first
    )


def _construct_int(loader: StrictLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten, as in YAML 1.2


class StrictDumper(yaml.SafeDumper):
    """Writes YAML that StrictLoader reads: quotes whatever either version takes for no text."""


for _first, _resolvers in StrictLoader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        StrictDumper.add_implicit_resolver(_tag, _regexp, [_first])


StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """The YAML document in the text. Raises InputError with the line where it is not one."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: {line}{error.problem}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except Exception as error:  # tags such as !!timestamp raise what they like
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None


def write_yaml(config: Config) -> str:
    """The config as YAML in blocks, every key of it, as load_config reads it."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, width=10**6).rstrip("\n")


# --- from files and command lines ---------------------------------------------------------------


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's values with the overrides (a.b=value) put in, not checked yet."""
    try:
        require_regular_file(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such config file{hint}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, where a YAML file is asked for") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of keys to values")
    return override(values, overrides)


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested values with each a.b=value put in, the value read as YAML.

    A section without a value, as one whose keys are all commented out, is left to its defaults.
    """
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"--set {item}: not of the form KEY=VALUE, e.g. model.channels=32")
        *sections, last = key.split(".")
        inner: Any = values
        for section in sections:
            if inner.setdefault(section, {}) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise InputError(f"--set {item}: {section} holds no keys")
        inner[last] = parse_yaml(text, f"--set {item}")
    return {k: v for k, v in values.items() if v is not None or k not in SECTIONS}


def make_config(values: Mapping[str, Any], where: str) -> Config:
    """The checked config. Raises InputError: where, the key, what is wrong, what is right."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with the overrides of the command line."""
    where = f"{path} with --set" if overrides else str(path)
    return make_config(read_yaml(path, overrides), where)


def explain(error: ValidationError) -> str:
    """The first of the errors in one line: key, what is wrong, what would be right."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for one in error.errors():
        by_key.setdefault(tuple(map(str, one["loc"][:2])), []).append(one)
    # A value that may be a number or a list fails as both: the deeper look knows more.
    first = max(next(iter(by_key.values())), key=lambda one: len(one["loc"]))
    path = [str(part) for part in first["loc"][:2]]
    path += [str(part) for part in first["loc"][2:] if isinstance(part, int)]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + _nearest_key(path)
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] != "value_error" or len(path) > 1:
        # of a constraint between keys the message itself names them and the values
        message = f"{message[0].lower()}{message[1:]} (it is {_shortened(first['input'])})"
    key = ".".join(path)
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    return (f"{key}: " if key else "") + message + more


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(path: list[str]) -> str:
    section: Any = Config
    for part in path[:-1]:
        section = section.model_fields[part].annotation
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
    """The dotted keys of these sections in which two configs differ."""
    keys = []
    for section in sections:
        left, right = a.model_dump()[section], b.model_dump()[section]
        if not isinstance(left, dict):
            keys += [section] if left != right else []
            continue
        keys += [f"{section}.{key}" for key in left if left[key] != right[key]]
    return keys
