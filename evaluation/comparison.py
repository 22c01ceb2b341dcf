"""Checkpoints, samplers and step counts side by side: what is drawn, and what is measured of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffusion.samplers import make_sampler
from evaluation.features import Extractor, Features
from evaluation.gallery import Gallery, RealImages
from evaluation.quality import (
    CONFIDENT,
    NEAREST,
    NOISE_SETS,
    class_shares,
    confident_share,
    flat,
    measure,
    nearest,
    share_nearer,
)
from evaluation.results import FLOOR, Key, Results, Row, read_results, write_results
from pipeline.checkpoint import Checkpoint, digest
from pipeline.codec import encode
from pipeline.config import DataConfig
from utils.command import InputError, say
from utils.images import make_grid, save_png

Images = UInt8[Tensor, "n c h w"]
PICTURED = 12  # samples beside their nearest training images


@dataclass(frozen=True)
class Job:
    """Images to be drawn and measured. path: where the checkpoint lies."""

    checkpoint: Checkpoint
    path: Path
    sampler: str
    steps: int
    count: int

    @property
    def key(self) -> Key:
        """That of its row."""
        return Key(self.checkpoint.name, self.path.stem, self.sampler, self.steps, self.count)

    @property
    def calls(self) -> int:
        """Of the network, an image each."""
        return self.steps * self.count


def plan_jobs(
    checkpoints: Mapping[Path, Checkpoint],
    samplers: Sequence[str],
    steps: Sequence[int] | None,
    count: int,
    max_calls: int | None,
) -> list[Job]:
    """A base model by each sampler at each step count, a student by DDIM at its own.

    count: of the images; less where steps x images would be more than max_calls. Raises InputError
    where too few are left to measure.
    """
    for sampler in samplers:
        try:
            make_sampler(sampler)
        except ValueError as error:
            raise InputError(f"--sampler: {error}") from None
    jobs = []
    for path, checkpoint in checkpoints.items():
        own = checkpoint.num_steps
        if own is not None:
            pairs = [(checkpoint.sampler or "ddim", own)]
        else:
            wanted = steps or [checkpoint.config.sampling.steps]
            pairs = [(sampler, n) for sampler in samplers for n in wanted]
        for sampler, n in pairs:
            size = count if max_calls is None else min(count, max_calls // n)
            if size < 2 * NOISE_SETS:
                raise InputError(
                    f"--count, --max_calls: leave {size} images at {n} steps; "
                    f"to measure takes at least {2 * NOISE_SETS}"
                )
            jobs.append(Job(checkpoint, path, sampler, n, size))
    return jobs


def require_same_data(checkpoints: Mapping[Path, Checkpoint], data: DataConfig) -> None:
    """Raises InputError for a model of other images than those that it would be compared with."""

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
    """Raises InputError where two files would be one row."""
    names = [f"{checkpoint.name}: {path.stem}" for path, checkpoint in checkpoints.items()]
    names += [path.stem for path in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice}: two files of this name; rename one, or measure it in another folder"
        )


class Partners(NamedTuple):
    """Whose images from the same noise a job's are compared with: its teacher's, the base model's.

    The base model's are those of the most DDIM steps. None where there are no such.
    """

    teacher: Job | None
    base: Job | None

    @classmethod
    def of(cls, job: Job, jobs: Sequence[Job]) -> "Partners":
        """Looked for among the jobs."""
        teacher = next((other for other in jobs if _teaches(other, job)), None)
        bases = [other for other in jobs if _is_base_of(other, job)]

        def nearness(other: Job) -> tuple[bool, int, int]:
            same_run = other.checkpoint.name == job.checkpoint.name
            return same_run, other.checkpoint.update, other.steps

        base = max(bases, key=nearness, default=None)
        alone = base is job or job.sampler != "ddim"
        return cls(teacher, None if alone else base)

    def tell_more_than(self, row: Row) -> bool:
        """Whether an earlier call, which measured the row, knew less."""
        has_classes = row.quality.classes is not None
        untold = row.to_teacher is None or (has_classes and row.teachers_class is None)
        new_teacher = self.teacher is not None and untold
        return new_teacher or (self.base is not None and self.base.steps > (row.base_steps or 0))


class Comparison:
    """Measures sets of images against the same real ones.

    extract: the frozen network; real: what is compared with; with_training: whether memorised
    training images are looked for too.
    """

    def __init__(self, extract: Extractor, real: RealImages, with_training: bool = True) -> None:
        self.extract, self.real = extract, real
        self.reference = extract(real.reference, "features of real images")
        self.training = None
        if with_training and real.training is not None:
            self.training = extract(real.training, "features of training images")
            held_out = real.reference[:NEAREST]
            self.real_nearest = {
                "pixels": nearest(flat(held_out), flat(real.training))[0],
                "features": nearest(self.reference.values[:NEAREST], self.training.values)[0],
            }

    def about_reference(self) -> dict[str, object]:
        """What the real images themselves are like."""
        logits = self.reference.logits
        about: dict[str, object] = {
            "count": len(self.real.reference),
            "digest": digest(self.real.reference),
            "features": self.extract.identity,
        }
        if logits is not None:
            about |= {"confident": confident_share(logits), "classes": class_shares(logits)}
        return about

    def floor(self, count: int) -> Row:
        """Real images against others of their kind: what no model can be expected to beat."""
        features = self.extract(self.real.floor[:count])
        return Row(FLOOR, "floor", "", None, measure(features, self.reference))

    def foreign(self, name: str, images: Images) -> Row:
        """Images from elsewhere."""
        features = self.extract(images)
        quality = measure(features, self.reference)
        pixels, nearness = self.memorised(images, features)
        return Row(
            name, "images", "", None, quality, memorised_pixels=pixels, memorised_features=nearness
        )

    def memorised(self, images: Images, features: Features) -> tuple[float | None, float | None]:
        """The shares of samples suspiciously near to a training image, in pixels and features."""
        if self.real.training is None or self.training is None:
            return None, None
        near = {
            "pixels": nearest(flat(images[:NEAREST]), flat(self.real.training))[0],
            "features": nearest(features.values[:NEAREST], self.training.values)[0],
        }
        return tuple(share_nearer(near[key], self.real_nearest[key]) for key in near)  # type: ignore[return-value]

    def drawn(self, job: Job, partners: "Partners", gallery: Gallery) -> Row:
        """A job's row."""
        images = _images_of(job, gallery)
        features = self.extract(images)
        pixels, nearness = self.memorised(images, features)

        def against(other: Job | None) -> tuple[float | None, float | None]:
            """The squared distance to another's images, the share of one class with them."""
            if other is None:
                return None, None
            theirs = _images_of(other, gallery)
            logits = self.extract(theirs).logits
            if logits is None or features.logits is None:
                return squared_distance(images, theirs), None
            return squared_distance(images, theirs), agreement(features.logits, logits)

        to_teacher, teachers_class = against(partners.teacher)
        to_base, same_class = against(partners.base)
        return Row(
            name=job.path.stem,
            kind=job.checkpoint.kind,
            sampler=job.sampler,
            steps=job.steps,
            quality=measure(features, self.reference),
            to_teacher=to_teacher,
            teachers_class=teachers_class,
            to_base=to_base,
            same_class=same_class,
            asked_class=asked_share(features.logits, job.checkpoint.config.model.num_classes),
            memorised_pixels=pixels,
            memorised_features=nearness,
            base_steps=None if partners.base is None else partners.base.steps,
            run=job.checkpoint.name,
            update=job.checkpoint.update,
            source=gallery.key(job.checkpoint, job.sampler, job.steps),
        )

    def draw_nearest(self, path: Path, images: Images) -> None:
        """A picture: the samples nearest to a training image, and that image below each."""
        if self.real.training is None:
            return
        distances, indices = nearest(flat(images[:NEAREST]), flat(self.real.training))
        closest = distances.argsort()[:PICTURED]
        below = self.real.training[indices[closest].long()]
        save_png(path, make_grid(torch.cat([images[closest], below]), columns=PICTURED), scale=2)


def _images_of(job: Job, gallery: Gallery) -> Images:
    return gallery.images(job.checkpoint, job.path, job.sampler, job.steps, job.count)


def _teaches(other: Job, job: Job) -> bool:
    """Whether the other's images are those that the job's student was taught to make."""
    student = job.checkpoint
    if student.kind != "student" or other.sampler != (other.checkpoint.sampler or "ddim"):
        return False
    ladder = student.config.distillation.steps()
    steps = [teacher for teacher, own in pairwise(ladder) if own == job.steps]
    return other.steps in steps and (
        digest(other.checkpoint.weights) == student.lineage.get("teacher")
    )


def _is_base_of(other: Job, job: Job) -> bool:
    """Whether the other's images are DDIM's of a base model of the same shape and data."""
    a, b = other.checkpoint.config, job.checkpoint.config
    same = (a.model, a.diffusion, a.data.name) == (b.model, b.diffusion, b.data.name)
    return same and other.checkpoint.num_steps is None and other.sampler == "ddim"


def squared_distance(a: UInt8[Tensor, "n c h w"], b: UInt8[Tensor, "m c h w"]) -> float:
    """The mean squared distance of pixels in the model's range, over the images that both have."""
    size = min(len(a), len(b))
    return (encode(a[:size]) - encode(b[:size])).square().mean().item()


def asked_share(logits: Float[Tensor, "n k"] | None, num_classes: int | None) -> float | None:
    """The share of a conditional model's images, drawn for the classes in turn, that are theirs."""
    if logits is None or num_classes != logits.shape[1]:
        return None
    asked = torch.arange(len(logits)) % num_classes
    return (logits.argmax(1) == asked).float().mean().item()


def agreement(a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> float:
    """The share of images of one class in both, over those that both have."""
    size = min(len(a), len(b))
    return (a[:size].argmax(1) == b[:size].argmax(1)).float().mean().item()


def say_of(row: Row) -> str:
    """A row in words."""
    q = row.quality
    steps = "" if row.steps is None else f", {row.sampler}, {row.steps} steps"
    sure = "" if q.confident is None else f", {q.confident:.1%} more than {CONFIDENT:.0%} sure"
    return (
        f"{row.name}{steps}: Frechet distance {q.frechet:.3f} ± {q.frechet_interval:.3f} "
        f"(n = {q.count:,}){sure}"
    )


# --- a whole comparison ---------------------------------------------------------------------------


def draw_all(jobs: Sequence[Job], gallery: Gallery) -> None:
    """Draws the images of all jobs, the longest last, but for those that the gallery has."""
    total, done = sum(job.calls for job in jobs), 0
    for job in sorted(jobs, key=lambda j: j.calls):
        begun = time.perf_counter()
        _images_of(job, gallery)
        done += job.calls
        say(
            f"{job.path.stem}, {job.sampler}, {job.steps} steps: {job.count} images, "
            f"{time.perf_counter() - begun:.0f} s; {done / total:.0%} of all network calls done"
        )


def known_results(output: Path, extract: Extractor, real: RealImages) -> Results | None:
    """What earlier calls have measured.

    Raises InputError where that was by other features, or against other real images.
    """
    before = read_results(output / "results.json")
    if before is None:
        return None
    other = None
    if before.features != extract.name:
        other = f"by the features {before.features}"
    elif before.reference.get("features") != extract.identity:
        other = f"by other weights of the features {extract.name}, or another use of them"
    elif before.reference.get("digest") != digest(real.reference):
        other = "against other real images"
    if other is not None:
        raise InputError(f"{output}/results.json: measured {other}; give another --output")
    return before


def measure_all(
    jobs: Sequence[Job],
    foreign: Mapping[str, Images],
    extract: Extractor,
    real: RealImages,
    gallery: Gallery,
    output: Path,
) -> Results:
    """Measures what was drawn, and images from elsewhere; writes the tables after every row.

    A row that an earlier call has measured, of the same weights, is not measured again.
    """
    comparison = Comparison(extract, real)
    about = comparison.about_reference()
    before = known_results(output, extract, real)
    results = Results(extract.name, about, before.rows if before else [])
    known = {(row.key, row.source): row for row in results.rows}

    def add(row: Row) -> None:
        nonlocal results
        say(say_of(row))
        results = results.with_rows([row])
        write_results(output, results)

    for count in sorted({job.count for job in jobs} | {len(images) for images in foreign.values()}):
        if count <= len(real.floor) and (floor_key(count), "") not in known:
            add(comparison.floor(count))
    for name, images in foreign.items():
        add(comparison.foreign(name, images))
        comparison.draw_nearest(output / f"nearest-{name}.png", images)
    for job in jobs:
        row = known.get((job.key, gallery.key(job.checkpoint, job.sampler, job.steps)))
        partners = Partners.of(job, jobs)
        if row is not None and partners.tell_more_than(row):
            add(with_relations_of(row, comparison.drawn(job, partners, gallery)))
        elif row is None:
            add(comparison.drawn(job, partners, gallery))
        named = f"{job.key.run}-{job.key.name}-{job.sampler.replace(':', '-')}-{job.steps}"
        picture = output / f"nearest-{named}.png"
        if row is None or not picture.exists():
            comparison.draw_nearest(picture, _images_of(job, gallery))
    write_results(output, results)  # where a stop came after the last row too
    return results


def with_relations_of(before: Row, row: Row) -> Row:
    """The row, with what an earlier call knew of partners that are not here now."""
    if row.to_teacher is None:
        row = replace(row, to_teacher=before.to_teacher, teachers_class=before.teachers_class)
    if (row.base_steps or 0) < (before.base_steps or 0):
        row = replace(
            row,
            to_base=before.to_base,
            same_class=before.same_class,
            base_steps=before.base_steps,
        )
    return row


def floor_key(count: int) -> Key:
    """The key of the floor's row."""
    return Key("", FLOOR, "", 0, count)
