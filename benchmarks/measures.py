"""What the checkpoints of a sweep are measured by."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sweeps import Sweep
from diffusion.losses import SQUARED_ERRORS
from diffusion.objectives import distillation_objective
from diffusion.paths import neighbours
from evaluation import gallery
from evaluation.features import Extractor, Features, make_extractor
from evaluation.quality import background, measure, squared_distance
from pipeline.build import load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.codec import encode
from pipeline.config import load_config
from pipeline.sampling import SampleRequest
from training.folder import kept_to_itself
from training.metrics import read_metrics
from utils.processes import World
from utils.randomness import generator

Rows = list[dict[str, Any]]
HELD_OUT = 2000  # test images
TIMED = 64  # images in a batch whose sampling is timed


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a variant, and what it took with all the students before it."""

    path: Path
    updates: int
    images: int
    calls: int


@dataclass(frozen=True)
class Measurer:
    """Measures the checkpoints of a sweep. teacher: file of the students' teacher, if any."""

    sweep: Sweep
    teacher: Path | None
    count: int
    output: Path
    device: torch.device

    @cached_property
    def taught_by(self) -> Checkpoint | None:
        """The teacher's checkpoint."""
        return None if self.teacher is None else load_checkpoint(self.teacher)

    def rows(self, trained: Trained) -> Rows:
        """What is measured of a checkpoint: a row for each way of sampling it."""
        checkpoint = load_checkpoint(trained.path)
        about = {
            "updates": trained.updates,
            "images": trained.images,
            "calls": trained.calls,
            "losses": losses_of(trained.path.parent) if self.teacher is None else [],
            "held_out": self.held_out_loss(checkpoint) if self.sweep.held_out else None,
        }
        ways = ways_to_sample(self.sweep, checkpoint)
        return [about | self.row(trained.path, checkpoint, *way) for way in ways]

    def teacher_row(self, path: Path, teacher: Checkpoint) -> dict[str, Any]:
        """What is measured of the students' teacher."""
        nothing = {"updates": 0, "images": 0, "calls": 0, "losses": [], "held_out": None}
        return nothing | self.row(path, teacher, *way_of_teacher(teacher, teacher))

    def row(self, path: Path, checkpoint: Checkpoint, sampler: str, steps: int) -> dict[str, Any]:
        """What is measured of one way of sampling a checkpoint."""
        return {
            "parameters": sum(tensor.numel() for tensor in checkpoint.model.values()),
            "sampler": sampler,
            "steps": steps,
            "milliseconds": self.milliseconds(checkpoint, path, sampler, steps),
            **self.quality(path, checkpoint, sampler, steps),
        }

    def quality(
        self, path: Path, checkpoint: Checkpoint, sampler: str, steps: int
    ) -> dict[str, Any]:
        """The distances of samples to real images and to the teacher's from the same noise.

        without: see Quality.
        """
        extract, reference = self.extractor
        images = self.samples(path, checkpoint, sampler, steps)
        features = extract(images)
        quality = measure(features, reference)
        distance = None
        if self.teacher is not None and self.taught_by is not None:
            way = way_of_teacher(self.taught_by, checkpoint)
            theirs = self.samples(self.teacher, self.taught_by, *way)
            distance = squared_distance(images, theirs)
        return {
            "frechet": quality.frechet,
            "interval": quality.frechet_interval,
            "without": quality.without,
            "confident": quality.confident,
            "recall": quality.recall,
            "faint": background(images)[0],
            "to_teacher": distance,
        }

    def samples(self, path: Path, checkpoint: Checkpoint, sampler: str, steps: int) -> Tensor:
        """Samples; those of all checkpoints start from the same noise."""
        where = path.parent.name
        drawn = gallery.Gallery(self.output / "samples" / where, World(self.device), 0, 125)
        with locked(self.output / "locks" / f"samples-{where}", wait=True):
            return drawn.images(checkpoint, path, sampler, steps, self.count)

    @cached_property
    def real(self) -> Tensor:
        """The real images."""
        teacher = self.taught_by
        config = load_config(self.sweep.base or Path()) if teacher is None else teacher.config
        return gallery.real_images(config).reference

    @cached_property
    def extractor(self) -> tuple[Extractor, Features]:
        """The extractor of features, and those of the real images."""
        extract = make_extractor("digits", self.device)
        return extract, extract(self.real, "features of real images")

    def milliseconds(
        self, checkpoint: Checkpoint, path: Path, sampler: str, steps: int
    ) -> float | None:
        """The CPU time of sampling an image; None on another device."""
        if self.device.type != "cpu":
            return None
        return milliseconds_per_image(checkpoint, path, sampler, steps)

    def held_out_loss(self, student: Checkpoint) -> float:
        """The loss, weighted by max(1, SNR), on test images, with the same draws for all."""
        teacher, cpu = self.taught_by or student, torch.device("cpu")
        steps = student.config.distillation.steps()[0]
        paths = neighbours(teacher.levels(steps), student.levels())
        denoisers = [load_denoiser(one, self.output, cpu) for one in (student, teacher)]
        legs = denoisers[1:] * (len(paths) - 1)
        objective = distillation_objective(denoisers[0], legs, paths, SQUARED_ERRORS["snr_trunc"])
        rng = generator("cpu", "held-out")
        losses = []
        with torch.no_grad():
            for images in self.real[:HELD_OUT].split(100):
                drawn = objective.draw(rng, images.shape)
                losses.append(objective.loss(encode(images), {}, drawn)[0])
        return torch.cat(losses).mean().item()


def ways_to_sample(sweep: Sweep, checkpoint: Checkpoint) -> list[tuple[str, int]]:
    """The samplers and step counts by which a checkpoint is measured.

    A student is sampled in its own steps, one of consistency distillation in any number.
    """
    if checkpoint.num_steps is None:
        return [(name, n) for name in sweep.samplers for n in sweep.steps]
    own: tuple[int, ...] = (checkpoint.num_steps,)
    if checkpoint.own_steps is None:
        own = sweep.steps or own
    return [(checkpoint.sampler or "ddim", n) for n in own if n in (sweep.steps or own)]


def way_of_teacher(teacher: Checkpoint, checkpoint: Checkpoint) -> tuple[str, int]:
    """The sampler and steps by which a teacher draws what a checkpoint's samples are compared with.

    A base model takes the steps that the student's ladder begins with, for itself those it is
    sampled in by default.
    """
    config = checkpoint.config
    first = config.sampling.steps if checkpoint.kind == "base" else config.distillation.steps()[0]
    return teacher.sampler or "ddim", teacher.num_steps or first


def milliseconds_per_image(checkpoint: Checkpoint, path: Path, sampler: str, steps: int) -> float:
    """Returns the CPU time of sampling an image in a batch of TIMED, the least of three batches."""
    cpu = torch.device("cpu")
    denoiser = load_denoiser(checkpoint, path, cpu)
    request = SampleRequest.of(checkpoint, denoiser, World(cpu), steps=steps, sampler=sampler)
    taken = []
    for _ in range(3):
        begun = time.process_time()
        request.draw(range(TIMED))
        taken.append(time.process_time() - begun)
    return 1000 * min(taken) / TIMED


def losses_of(folder: Path) -> list[float | None]:
    """The mean loss of the updates 850 to 1,150, None without these, and of the last tenth."""
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    parts = losses[850:1150], losses[-max(1, len(losses) // 10) :]
    return [statistics.mean(part) if part else None for part in parts]


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Locks the folder among processes. Yields whether that succeeded, with wait always True."""
    while True:
        with kept_to_itself(folder) as alone:
            if alone or not wait:
                yield alone
                return
        time.sleep(5)
