"""What an evaluation draws: checkpoints x samplers x step counts, and which belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation.quality import FEWEST
from evaluation.results import FLOOR, NOISY, Key, Row
from pipeline.checkpoint import Checkpoint, digest
from pipeline.engine import asked_engine
from pipeline.sampling import require_guidable, require_sampler
from pipeline.sections import DataConfig
from utils.command import InputError


@dataclass(frozen=True)
class Job:
    """Images to draw and to measure. path: the checkpoint's file; guidance: the weight."""

    checkpoint: Checkpoint
    path: Path
    sampler: str
    steps: int
    count: int
    guidance: float = 0.0

    @property
    def key(self) -> Key:
        """The key of the job's row in the results."""
        name, way = self.checkpoint.name, (self.sampler, self.steps, self.guidance)
        return Key(name, self.label, *way, self.count)

    @property
    def label(self) -> str:
        """The name of the file, and the precision of its network if that is reduced."""
        engine = self.checkpoint.config.engine  # of with_engine
        reduced = engine.cpu_sampling and engine.precision != "fp32"
        return f"{self.path.stem}, {engine.precision}" if reduced else self.path.stem

    @property
    def title(self) -> str:
        """The job in words."""
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return f"{self.label}, {self.sampler}, {self.steps} steps{guided}"

    @property
    def calls(self) -> int:
        """The number of network calls, each for one image."""
        twice = self.guidance and not self.checkpoint.config.model.guidance
        return self.steps * self.count * (2 if twice else 1)


def plan_jobs(
    checkpoints: Mapping[Path, Checkpoint],
    samplers: Sequence[str],
    steps: Sequence[int] | None,
    count: int,
    max_calls: int | None,
    guidance: Sequence[float] = (0.0,),
) -> list[Job]:
    """Returns a job for each base model, sampler and step count, and one for each student.

    A student is sampled with its own sampler and steps, one of consistency distillation in each of
    the step counts, as it has learnt all jumps; all with each of the guidance weights.
    count: the number of images; fewer if steps x images exceeds max_calls. Raises InputError if
    that leaves too few to measure, and for a checkpoint that cannot be guided.
    """
    for sampler in samplers:
        require_sampler(sampler)
    for weight, checkpoint in product(guidance, checkpoints.values()):
        require_guidable(weight, checkpoint)
    jobs = []
    for path, checkpoint in checkpoints.items():
        wanted = steps or [checkpoint.config.sampling.steps]
        pairs = [(sampler, n) for sampler in samplers for n in wanted]
        if checkpoint.num_steps is not None:
            own, only = checkpoint.sampler or "ddim", checkpoint.own_steps
            counts = [only] if only else steps or [checkpoint.num_steps]
            pairs = [(own, n) for n in counts]
        for sampler, n in pairs:
            require_levels(path, checkpoint, n)
            size = count if max_calls is None else min(count, max_calls // n)
            if size < FEWEST:
                raise InputError(
                    f"--count, --max_calls: leave {size} images at {n} steps; "
                    f"measuring needs at least {FEWEST}"
                )
            jobs += [Job(checkpoint, path, sampler, n, size, weight) for weight in guidance]
    return jobs


def require_levels(path: Path, checkpoint: Checkpoint, num_steps: int) -> None:
    """Raises InputError for more steps than a table of levels has."""
    try:
        checkpoint.levels(num_steps)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def with_engine(
    checkpoint: Checkpoint, device: torch.device, precision: str | None, compiled: bool
) -> Checkpoint:
    """Returns the checkpoint with its engine as it is run on the device: see asked_engine."""
    engine = asked_engine(checkpoint.config.engine, device, precision, compiled)
    return replace(checkpoint, config=checkpoint.config.model_copy(update={"engine": engine}))


def require_same_data(checkpoints: Mapping[Path, Checkpoint], data: DataConfig) -> None:
    """Raises InputError for a checkpoint that makes other images than those to compare with."""

    def of(data: DataConfig) -> str:
        return f"{data.name}, {data.image_size}x{data.image_size}, {data.channels} channels"

    for path, checkpoint in checkpoints.items():
        own = checkpoint.config.data
        if of(own) != of(data):
            raise InputError(
                f"{path}: makes images of {of(own)}, to be compared with {of(data)}; measure it "
                "alone, without --config_path"
            )


def require_different_names(checkpoints: Mapping[Path, Checkpoint], images: Sequence[Path]) -> None:
    """Raises InputError if two files would share a row."""
    names = [f"{checkpoint.name}: {path.stem}" for path, checkpoint in checkpoints.items()]
    names += [FLOOR, NOISY, *map(name_of_images, images)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice}: two of this name in the results; rename one, or measure it in another folder"
        )


def name_of_images(path: Path) -> str:
    """Returns what the images of a folder, or of an .npz file, are called in the results."""
    return path.stem if path.suffix.lower() == ".npz" else path.resolve().name


class Partners(NamedTuple):
    """The jobs to compare a job with, image by image: its teacher's and the base model's.

    The base model's is one with DDIM steps: of the same run if there is one, then of the longest
    training, then with the most steps. None if the job is that one itself, or is not sampled by
    DDIM.
    """

    teacher: Job | None
    base: Job | None

    @classmethod
    def of(cls, job: Job, jobs: Sequence[Job]) -> "Partners":
        """Finds the partners of a job among all jobs."""
        teacher = next((other for other in jobs if _teaches(other, job)), None)
        bases = [other for other in jobs if _is_base_of(other, job)]
        same_run = [other for other in bases if other.checkpoint.name == job.checkpoint.name]
        longest = max(same_run or bases, key=lambda j: (j.checkpoint.update, j.steps), default=None)
        alone = longest is job or job.sampler != "ddim"
        return cls(teacher, None if alone else longest)

    def add_to(self, row: Row) -> bool:
        """Returns whether they add a relation that the earlier call which measured row lacked."""
        has_classes = row.quality.classes is not None
        untold = row.to_teacher is None or (has_classes and row.teachers_class is None)
        new_teacher = self.teacher is not None and untold
        return new_teacher or (self.base is not None and self.base.steps > (row.base_steps or 0))


def _teaches(other: Job, job: Job) -> bool:
    """Returns whether the other job draws the images that this job's student was taught."""
    student = job.checkpoint
    if student.kind != "student" or other.sampler != (other.checkpoint.sampler or "ddim"):
        return False
    if other.guidance != job.guidance:
        return False
    ladder = student.config.distillation.steps()
    steps = [teacher for teacher, own in pairwise(ladder) if own == job.steps]
    return other.steps in steps and (
        digest(other.checkpoint.weights) == student.lineage.get("teacher")
    )


def _is_base_of(other: Job, job: Job) -> bool:
    """Returns whether the other job is a base model of the same network and data, with DDIM.

    A student may take the guidance weight as an input where its base model is guided, and predict
    something else, and have another network (distillation.student).
    """
    a, b = other.checkpoint.config, job.checkpoint.config
    model = b.model.model_copy(update={"guidance": False})
    levels = [c.diffusion.model_copy(update={"prediction": "v"}) for c in (a, b)]
    same = b.distillation.student is not None or a.model == model
    same = same and (levels[0], a.data.name) == (levels[1], b.data.name)
    same = same and a.codec.identity == b.codec.identity
    same = same and other.guidance == job.guidance
    return same and other.checkpoint.num_steps is None and other.sampler == "ddim"
