"""The config: one YAML file -> frozen, checked values. Every key is used; every constraint is here.

The defaults are the tutorial's recipe (configs/ddpm_32x32_v_continuous.yaml), except for
model.resample: a config without that key keeps the network that it has always had.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from diffusion.distillation import METHODS
from diffusion.gaussian import OUTPUT_TYPES
from diffusion.losses import LOSSES, SQUARED_ERRORS
from diffusion.samplers import make_sampler
from diffusion.schedule import SCHEDULES
from pipeline.data import DATASETS
from utils.command import InputError
from utils.strict_yaml import override, read_yaml

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
LossWeightName = Annotated[str, one_of(SQUARED_ERRORS)]
SamplerName = Annotated[str, AfterValidator(_sampler_name)]
CountPerStage = Count | Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)]
PositivePerStage = Positive | Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]
Exponent = Annotated[float, Field(ge=1.0, le=10.0)]
LossName = Annotated[str, one_of(LOSSES)]
MethodName = Annotated[str, one_of(METHODS)]
MethodPerStage = MethodName | Annotated[tuple[MethodName, ...], BeforeValidator(_as_tuple)]
Weight = Annotated[float, Field(ge=0.0, le=100.0)]
Time = Annotated[float, Field(ge=0.0, le=1.0)]
GridChoice = (
    Literal["uniform", "adaptive"] | Annotated[tuple[Time, ...], BeforeValidator(_as_tuple)]
)
PER_STAGE = ("method", "updates_per_stage", "learning_rate", "time_exponent")
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
    """The UNet's sizes (models/unet.py). guidance: its students of guided distillation have it."""

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

    def misfit(self, image_size: int, where: str) -> str | None:
        """What keeps the network from working on images of this size; None if nothing does.

        where: the section's place in the config, for the key with which the text begins.
        """
        divisor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        if image_size % divisor:
            return (
                f"data.image_size: {image_size} is not divisible by {divisor}, which "
                f"{where}.patch_size and the {len(self.channel_multipliers)} levels of "
                f"{where}.channel_multipliers ask"
            )
        levels = range(len(self.channel_multipliers))
        resolutions = [image_size // self.patch_size >> level for level in levels]
        for resolution in self.attention_resolutions:
            if resolution not in resolutions:
                return (
                    f"{where}.attention_resolutions: {resolution} does not occur; the levels have "
                    f"{', '.join(map(str, resolutions))}"
                )
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        if resolutions[-1] == 1 and widths[-1] == math.gcd(32, widths[-1]):
            return (
                f"{where}.channel_multipliers: {len(widths)} levels leave one pixel, which "
                f"GroupNorm cannot normalise with {widths[-1]} channels, one a group; take fewer "
                "levels"
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
                    "has"
                )
        return None


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


class DistillationConfig(Recipe):
    """The ladder, and how each of its students is made.

    ladder: the teacher's steps, then those of every student. null: first_steps, of the FIRST
    student, halved by each of the iterations. method: an entry of METHODS. grid: uniform in time;
    adaptive, the steps that share the teacher's error; or, for a ladder of one student, its times
    from 1 down to 0. student: the network, if it is not the teacher's. losses: the terms of the
    loss and their weights, in place of loss_weight. guidance: the range of the guidance weight that
    the student takes as an input. ema_decay: of the average that is evaluated; walker_decay: of the
    one that walks the paths of tract and consistency. pull: decay towards the teacher's weights.

    method, updates_per_stage, learning_rate, time_exponent: one value, or a list with one for each
    stage. The rate falls to 0 within every stage. time_exponent: 1 draws all transitions alike, as
    the paper does; p draws the noisier ones more often, i of N with ((i + 1) / N)^p - (i / N)^p.
    """

    first_steps: Annotated[int, Field(ge=1, le=2**19)] = 512
    iterations: Annotated[int, Field(ge=1, le=31)] = 7
    ladder: Annotated[Counts, Field(min_length=2)] | None = None
    method: MethodPerStage = "progressive"
    grid: GridChoice = "uniform"
    student: ModelConfig | None = None
    updates_per_stage: CountPerStage = 5000
    learning_rate: PositivePerStage = 1.0e-4
    time_exponent: ExponentPerStage = 1.0
    loss_weight: LossWeightName = "snr_trunc"
    losses: Annotated[dict[LossName, Positive], Field(min_length=1)] | None = None
    guidance: Annotated[tuple[Weight, Weight], BeforeValidator(_as_tuple)] | None = None
    ema_decay: Fraction | None = None
    walker_decay: Fraction = 0.5
    pull: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _ladder_exists(self) -> "DistillationConfig":
        counts = self.steps()[1:]
        length = f"iterations is {self.iterations}"
        if self.ladder is not None:
            length = f"the ladder has {len(counts)}"
        for key in PER_STAGE:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != len(counts):
                raise ValueError(
                    f"{key} lists {len(value)} stages, but {length}: "
                    "give one number, or one for each stage"
                )
        methods = {self.of_stage(position)["method"] for position in range(len(counts))}
        for name in sorted(methods):
            if METHODS[name].needs_average and self.ema_decay is None:
                raise ValueError(
                    f"ema_decay: the method {name} evaluates an average of the student's weights; "
                    "give its decay, e.g. 0.999"
                )
        if self.guidance is not None and self.guidance[0] >= self.guidance[1]:
            raise ValueError(f"guidance: {list(self.guidance)} is no range; give [low, high]")
        if isinstance(self.grid, tuple):
            self._require_times(self.grid, counts)
        return self

    def _require_times(self, times: tuple[float, ...], counts: Sequence[int]) -> None:
        falls = all(b < a for a, b in pairwise(times))
        if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not falls:
            raise ValueError(f"grid: {list(times)} does not decrease from 1 to 0")
        if len(counts) != 1 or counts[0] != len(times) - 1:
            raise ValueError(
                f"grid: lists the times of {len(times) - 1} steps, but the ladder's students have "
                f"{', '.join(map(str, counts))}; list one student's, or take uniform or adaptive"
            )

    def steps(self) -> tuple[int, ...]:
        """The teacher's step count and every student's, e.g. (1024, 512, .., 8).

        Raises ValueError for a ladder that cannot be.
        """
        if self.ladder is not None:
            self._require_ladder(self.ladder)
            return self.ladder
        steps = [2 * self.first_steps, self.first_steps]
        for stage in range(1, self.iterations):
            if steps[-1] % 2:
                raise ValueError(
                    f"first_steps {self.first_steps} cannot be halved {self.iterations - 1} times: "
                    f"stage {stage} has {steps[-1]} steps; take a multiple of "
                    f"{2 ** (self.iterations - 1)}, or at most {stage} iterations"
                )
            steps.append(steps[-1] // 2)
        return tuple(steps)

    def _require_ladder(self, ladder: tuple[int, ...]) -> None:
        for n, (teacher, student) in enumerate(pairwise(ladder)):
            if student > teacher or (n and student == teacher):
                raise ValueError(
                    f"ladder: {student} steps after {teacher}; only the first student may have as "
                    "many steps as its teacher, all others have fewer"
                )
            if self.grid == "uniform" and teacher % student:
                raise ValueError(
                    f"ladder: {student} does not divide the {teacher} steps before it; take a "
                    "divisor, or grid: adaptive"
                )

    def of_stage(self, position: int) -> dict[str, Any]:
        """A stage's own values of the keys in PER_STAGE, counted from 0."""
        values = {key: getattr(self, key) for key in PER_STAGE}
        return {k: v[position] if isinstance(v, tuple) else v for k, v in values.items()}

    def updates_after(self, position: int) -> int:
        """The updates of all stages that follow this one."""
        later = range(position + 1, len(self.steps()) - 1)
        return sum(self.of_stage(n)["updates_per_stage"] for n in later)

    def loss_weights(self) -> dict[str, float]:
        """The terms of the loss and their weights."""
        return self.losses or {self.loss_weight: 1.0}


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
    def _sections_fit(self) -> "Config":
        student = self.distillation.student
        for where, model in (("model", self.model), ("distillation.student", student)):
            if model is not None and (wrong := model.misfit(self.data.image_size, where)):
                raise ValueError(wrong)
        classes = self.model.num_classes
        if self.training.label_dropout and classes is None:
            raise ValueError(
                f"training.label_dropout: {self.training.label_dropout} of no labels; set "
                "model.num_classes, or leave it at 0"
            )
        if student is not None and student.num_classes != classes:
            raise ValueError(
                f"distillation.student.num_classes: {student.num_classes}, but the teacher has "
                f"{classes}; take the same"
            )
        if self.distillation.guidance is not None and classes is None:
            raise ValueError(
                "distillation.guidance: takes a teacher that knows classes (model.num_classes)"
            )
        return self


SECTIONS = [
    name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")
]


# --- from files and command lines ---------------------------------------------------------------


def make_config(values: Mapping[str, Any], where: str) -> Config:
    """Returns the checked config. Raises InputError: where, the key, what is wrong.

    A section without a value, as one whose keys are all commented out, has its defaults.
    """
    given = {k: v for k, v in values.items() if v is not None or k not in SECTIONS}
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with the overrides of the command line."""
    where = f"{path} with --set" if overrides else str(path)
    return make_config(override(read_yaml(path), overrides), where)


def explain(error: ValidationError) -> str:
    """The first of the errors in one line: key, what is wrong, what would be right."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for one in error.errors():
        by_key.setdefault(tuple(map(str, one["loc"][:2])), []).append(one)
    # A value that may be a number or a list fails as both: the deeper look knows more.
    first = max(next(iter(by_key.values())), key=lambda one: len(one["loc"]))
    depth = 3 if first["loc"][:2] == ("distillation", "student") else 2  # a section in a section
    path = [str(part) for part in first["loc"][:depth]]
    path += [str(part) for part in first["loc"][depth:] if isinstance(part, int)]
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
    """The dotted keys of these sections in which two configs differ."""
    keys = []
    for section in sections:
        left, right = a.model_dump()[section], b.model_dump()[section]
        if not isinstance(left, dict):
            keys += [section] if left != right else []
            continue
        keys += [f"{section}.{key}" for key in left if left[key] != right[key]]
    return keys
