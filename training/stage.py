"""Stages as values: what is trained, for how long and how, made from a config."""

from dataclasses import dataclass, field
from typing import Any

from diffusion.distillation import METHODS, Method
from pipeline.config import Config
from pipeline.sections import Recipe
from pipeline.values import GridChoice


@dataclass(frozen=True)
class Stage:
    """One training: of the base model or of an autoencoder (both number 0), or of a student.

    updates_after: of the stages that follow, to estimate the time left. batch_size: of all
    processes and steps of accumulation together. learning_rate: the highest; it rises linearly
    over the first warmup updates, and falls linearly to 0 at the end if decays. ema_decay: of the
    average of the weights that is evaluated; None for no average. walker_decay: of the average
    that walks a student's paths, where its method needs one. conditional: whether the network is
    given the images' classes. The other values of a student are those of DistillationConfig.
    """

    number: int
    seed: int
    updates: int
    batch_size: int
    accumulate: int
    gradient_clip: float | None
    checkpoint_every: int
    learning_rate: float
    warmup: int = 0
    decays: bool = True
    weight_decay: float = 0.0
    ema_decay: float | None = None
    horizontal_flip: bool = False
    conditional: bool = False
    of_autoencoder: bool = False
    updates_after: int = 0
    # of students
    num_steps: int | None = None
    teacher_steps: int | None = None
    method: Method = METHODS["progressive"]
    grid: GridChoice = "uniform"
    time_exponent: float = 1.0
    losses: dict[str, float] = field(default_factory=dict)
    guidance: tuple[float, float] | None = None
    walker_decay: float | None = None
    pull: float = 0.0

    def saves_at(self, update: int) -> bool:
        """Whether a checkpoint is due after this many updates."""
        return update == self.updates or (update > 0 and update % self.checkpoint_every == 0)

    def rate_at(self, update: int) -> float:
        """The learning rate of an update, counted from 0.

        A student's is rate (1 - k/K), k = 0 .. K-1 (Salimans & Ho 2022, appendix).
        """
        rate = self.learning_rate * min(1.0, (update + 1) / max(1, self.warmup))
        if not self.decays:
            return rate
        return min(rate, self.learning_rate * (1.0 - update / self.updates))


def base_stage(config: Config) -> Stage:
    """The training of the base model."""
    training = config.training
    return Stage(
        number=0,
        updates=training.updates,
        learning_rate=training.learning_rate,
        warmup=training.warmup,
        decays=training.learning_rate_decay == "linear",
        weight_decay=training.weight_decay,
        ema_decay=training.ema_decay,
        **_shared(config, training),
    )


def student_stages(config: Config, first_number: int = 1) -> tuple[Stage, ...]:
    """The stages of the config's ladder, each student of which is the next one's teacher.

    first_number: of the first stage, on which its randomness depends.
    """
    ladder = config.distillation
    teacher_steps, *counts = ladder.steps()
    stages = []
    for position, num_steps in enumerate(counts):
        own = ladder.of_stage(position)
        method = METHODS[own["method"]]
        stages.append(
            Stage(
                number=first_number + position,
                updates=own["updates_per_stage"],
                updates_after=ladder.updates_after(position),
                learning_rate=own["learning_rate"],
                warmup=ladder.warmup,
                ema_decay=ladder.ema_decay,
                num_steps=num_steps,
                teacher_steps=teacher_steps,
                method=method,
                grid=ladder.grid,
                time_exponent=own["time_exponent"],
                losses=ladder.loss_weights(),
                guidance=ladder.guidance,
                walker_decay=ladder.walker_decay if method.needs_average else None,
                pull=ladder.pull,
                **_shared(config, ladder),
            )
        )
        teacher_steps = num_steps
    return tuple(stages)


def _shared(config: Config, recipe: Recipe) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "batch_size": recipe.batch_size,
        "accumulate": recipe.accumulate,
        "gradient_clip": recipe.gradient_clip,
        "checkpoint_every": recipe.checkpoint_every,
        "horizontal_flip": config.data.horizontal_flip,
        "conditional": config.model.num_classes is not None,
    }
