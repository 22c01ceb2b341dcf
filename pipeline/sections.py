"""The sections of a config: frozen, checked values. Every key is used.

The defaults are those of configs/ddpm_32x32_v_continuous.yaml, except for
model.resample: a config without that key keeps the network that it has always had.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffusion.distillation import METHODS
from diffusion.losses import ADVERSARIAL
from models.networks import NetworkSection
from pipeline.values import (
    DatasetName,
    Exponent,
    GridChoice,
    LossName,
    LossWeightName,
    MethodName,
    OutputTypeName,
    PathName,
    Range,
    Rate,
    SamplerName,
    ScheduleName,
)
from utils.values import Count, Counts, Fraction, ListOf, Positive, Section

# The keys of distillation that take one value, or a list with one for each stage.
PER_STAGE = ("method", "updates_per_stage", "learning_rate", "time_exponent")


class Recipe(Section):
    """What training and distillation share. accumulate: process a batch in so many parts."""

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
    """The images. root: the folder that contains <name>/, or the images of an image_folder."""

    name: DatasetName = "mnist"
    root: PathName = "data"
    image_size: Annotated[int, Field(ge=1, le=1024)] = 32
    channels: Literal[1, 3] = 1
    horizontal_flip: bool = False
    workers: Annotated[int, Field(ge=0, le=64)] = 2


class DiffusionConfig(Section):
    """The diffusion process and what the network predicts.

    schedule: a key of SCHEDULES, or table: the levels are in the checkpoint's grid, as those of an
    imported pipeline, which is not trained here. logsnr_min, logsnr_max: within [-20, 20], because
    the network's time input is clipped to that range (time_features in models/layers.py). clip:
    whether x_hat is clipped to [-1, 1] in training, targets and samplers alike (within_range in
    diffusion/gaussian.py); sampling.clip alone clips in samplers only.
    """

    prediction: OutputTypeName = "v"
    schedule: ScheduleName = "cosine"
    logsnr_min: Annotated[float, Field(ge=-20.0, lt=0.0)] = -20.0
    logsnr_max: Annotated[float, Field(gt=0.0, le=20.0)] = 20.0
    loss_weight: LossWeightName = "snr_plus_one"
    clip: bool = False


class TrainingConfig(Recipe):
    """Training the base model.

    learning_rate_decay: none, or linear to 0 after the warm-up. times: uniform in [0, 1], or
    stratified: one in each of batch_size equal parts of it, which makes the gradient less noisy.
    label_dropout: the share of images shown without their class, for classifier-free guidance.
    keep_checkpoints: how many of the newest to keep, null for all; those at multiples of
    milestone_every are always kept.
    """

    updates: Count = 10_000
    learning_rate: Rate = 2.0e-4
    learning_rate_decay: Literal["none", "linear"] = "none"
    times: Literal["uniform", "stratified"] = "uniform"
    warmup: Annotated[int, Field(ge=0, le=2**31)] = 1000
    weight_decay: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    ema_decay: Fraction = 0.9999
    label_dropout: Fraction = 0.0
    keep_checkpoints: Annotated[int, Field(ge=2, le=2**31)] | None = None
    milestone_every: Count | None = None


class DistillationConfig(Recipe):
    """The ladder of students, and how each of them is distilled.

    ladder: the teacher's number of steps, then every student's. null: the FIRST student has
    first_steps, and each of the iterations halves them. method: a key of METHODS. grid: uniform in
    time; adaptive, with equal shares of the teacher's error; or, for a ladder of one student, the
    list of its times from 1 down to 0. student: the student's network, if not the teacher's;
    prediction: what the students predict, if not what their teacher does; data: the data set whose
    images it is distilled on, if not the teacher's.
    losses: the terms of the loss and their weights, in place of loss_weight. guidance: the range of
    the guidance weight, if the student takes it as an input. ema_decay: of the average that is
    evaluated; walker_decay: of the average that walks the paths of tract and consistency. pull:
    the strength of the decay towards the weights that the student began with.

    method, updates_per_stage, learning_rate, time_exponent: one value, or a list with one for each
    stage. The learning rate falls to 0 in every stage; over the first warmup updates it rises, so
    that the critic of an adversarial loss learns first. time_exponent: 1 draws all transitions
    equally often, as in the paper; p draws transition i of N with probability
    ((i + 1) / N)^p - (i / N)^p, the noisier ones more often.
    """

    first_steps: Annotated[int, Field(ge=1, le=2**19)] = 512
    iterations: Annotated[int, Field(ge=1, le=31)] = 7
    ladder: Annotated[Counts, Field(min_length=2)] | None = None
    method: MethodName | ListOf[MethodName] = "progressive"
    grid: GridChoice = "uniform"
    student: NetworkSection | None = None
    prediction: OutputTypeName | None = None
    data: DatasetName | None = None
    updates_per_stage: Count | ListOf[Count] = 5000
    learning_rate: Rate | ListOf[Rate] = 1.0e-4
    warmup: Annotated[int, Field(ge=0, le=2**31)] = 0
    time_exponent: Exponent | ListOf[Exponent] = 1.0
    loss_weight: LossWeightName = "snr_trunc"
    losses: Annotated[dict[LossName, Positive], Field(min_length=1)] | None = None
    guidance: Range | None = None
    ema_decay: Fraction | None = None
    walker_decay: Fraction = 0.5
    pull: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0

    @model_validator(mode="after")
    def _stages_fit(self) -> "DistillationConfig":
        counts = self.steps()[1:]
        length = f"the ladder has {len(counts)}" if self.ladder else f"iterations is {len(counts)}"
        for key in PER_STAGE:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != len(counts):
                raise ValueError(
                    f"{key} lists {len(value)} stages, but {length}: "
                    "give one value, or one for each stage"
                )
        methods = {self.of_stage(position)["method"] for position in range(len(counts))}
        for name in sorted(methods):
            if METHODS[name].needs_average and self.ema_decay is None:
                raise ValueError(
                    f"ema_decay: the method {name} evaluates an average of the student's weights; "
                    "give its decay, e.g. 0.999"
                )
        if self.losses is not None and self.losses.keys() == {ADVERSARIAL}:
            raise ValueError(
                f"losses: {ADVERSARIAL} alone forgets the teacher; give another term beside it, "
                f"e.g. {{snr_trunc: 0.3, {ADVERSARIAL}: 0.3}}"
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
        """Returns the step counts of the teacher and of every student: (1024, 512, .., 8).

        Raises ValueError for an invalid ladder.
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
        """Returns the values of the keys in PER_STAGE for one stage. position: from 0."""
        values = {key: getattr(self, key) for key in PER_STAGE}
        return {k: v[position] if isinstance(v, tuple) else v for k, v in values.items()}

    def of_student(self, num_steps: int | None) -> dict[str, Any]:
        """Returns of_stage for the student of so many steps; for the first if there is none."""
        students = self.steps()[1:]
        return self.of_stage(students.index(num_steps) if num_steps in students else 0)

    def updates_after(self, position: int) -> int:
        """Returns the number of updates in all stages after this one."""
        later = range(position + 1, len(self.steps()) - 1)
        return sum(self.of_stage(n)["updates_per_stage"] for n in later)

    def loss_weights(self) -> dict[str, float]:
        """Returns the terms of the loss and their weights."""
        return self.losses or {self.loss_weight: 1.0}


class SamplingConfig(Section):
    """How the pictures beside the checkpoints are drawn. steps: the number for a base model."""

    steps: Annotated[int, Field(ge=1, le=2**20)] = 1024
    sampler: SamplerName = "ddim"
    clip: bool = True
    grid: Annotated[int, Field(ge=1, le=1024)] = 64


class EngineConfig(Section):
    """How networks are run. precision: under autocast; tf32: for float32 on GPUs.

    compile: torch.compile, which takes a minute at first. cuda_graphs: records the kernels of an
    update once and repeats them, for small networks on one GPU of NVIDIA's; it has no effect
    elsewhere, nor with several processes. cpu_sampling: whether these are meant for sampling too:
    otherwise it is not compiled, and on a CPU runs in float32.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    tf32: bool = True
    cuda_graphs: bool = False
    cpu_sampling: bool = False
