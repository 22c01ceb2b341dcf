"""Measures images against real ones and against those of other models, from the same noise."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from evaluation.curves import draw_distances
from evaluation.features import Extractor, Features
from evaluation.gallery import Gallery, RealImages
from evaluation.jobs import Job, Partners
from evaluation.quality import (
    NEAREST,
    agreement,
    asked_share,
    background,
    class_shares,
    confident_share,
    flat,
    measure,
    nearest,
    share_nearer,
    squared_distance,
)
from evaluation.results import FLOOR, NOISY, Key, Results, Row, read_results, with_relations_of
from evaluation.tables import in_words, write_results
from pipeline.checkpoint import digest
from utils.command import InputError, say
from utils.images import make_grid, save_png
from utils.randomness import generator

Images = UInt8[Tensor, "n c h w"]
FAINTEST = 6  # the largest value of the noise under real images
PICTURED = 12  # samples shown with their nearest training images


class Comparison:
    """Measures sets of images against the same real images.

    extract: the frozen network; real: the real images. What takes long, and is asked for again by
    another row or picture, is kept by the images' digest.
    """

    def __init__(self, extract: Extractor, real: RealImages) -> None:
        self.extract, self.real = extract, real
        self.reference = extract(real.reference, "features of real images")
        self._logits: dict[str, Tensor | None] = {}
        self._in_pixels: dict[str, tuple[Tensor, Tensor]] = {}
        self.training = None
        if real.training is not None:
            self.training = extract(real.training, "features of training images")
            held_out = real.reference[:NEAREST]
            self.real_nearest = {
                "pixels": nearest(flat(held_out), flat(real.training))[0],
                "features": nearest(self.reference.values[:NEAREST], self.training.values)[0],
            }

    def about_reference(self) -> dict[str, object]:
        """Returns what identifies and describes the real images, for results.json."""
        logits = self.reference.logits
        about: dict[str, object] = {
            "count": len(self.real.reference),
            "digest": digest(self.real.reference),
            "features": self.extract.identity,
        }
        if logits is None:
            return about
        return about | {"confident": confident_share(logits), "classes": class_shares(logits)}

    def floor(self, count: int) -> Row:
        """Returns the row of real images against other real ones: the best a model can reach."""
        images = self.real.floor[:count]
        return self._alone(FLOOR, "floor", images, self.extract(images))

    def floor_on_noise(self, count: int) -> Row:
        """Returns the row of real images on faint noise: how sensitive the features are to it.

        Each pixel is the larger one of its own value and a uniform one of 0 .. 6.
        """
        images = self.real.floor[:count]
        rng = generator("cpu", "noise under real images")
        noise = torch.randint(0, FAINTEST + 1, images.shape, generator=rng, dtype=torch.uint8)
        noisy = images.maximum(noise)
        return self._alone(NOISY, "images", noisy, self.extract(noisy))

    def _alone(
        self, name: str, kind: Literal["floor", "images"], images: Images, features: Features
    ) -> Row:
        faint, border = self.background(images)
        quality = measure(features, self.reference)
        return Row(name, kind, "", None, quality, faint=faint, border=border)

    def background(self, images: Images) -> tuple[float | None, float | None]:
        """Returns the faint pixels and the border of digits (see quality.background)."""
        return (None, None) if self.real.training is None else background(images)

    def row_of_files(self, name: str, images: Images) -> Row:
        """Returns the row of images that were read from files."""
        features = self.extract(images)
        pixels, nearness = self.memorised(images, features)
        row = replace(self._alone(name, "images", images, features), source=digest(images))
        return replace(row, memorised_pixels=pixels, memorised_features=nearness)

    def memorised(self, images: Images, features: Features) -> tuple[float | None, float | None]:
        """Returns the shares of samples very close to a training image, in pixels and features."""
        if self.real.training is None or self.training is None:
            return None, None
        near = {
            "pixels": self.nearest_in_pixels(images, self.real.training)[0],
            "features": nearest(features.values[:NEAREST], self.training.values)[0],
        }
        return tuple(share_nearer(near[key], self.real_nearest[key]) for key in near)  # type: ignore[return-value]

    def nearest_in_pixels(
        self, images: Images, training: UInt8[Tensor, "m c h w"]
    ) -> tuple[Float[Tensor, "k"], Int[Tensor, "k"]]:
        """Returns the distances of the first images to training images, and their indices."""
        first = images[:NEAREST]
        key = digest(first)
        if key not in self._in_pixels:
            self._in_pixels[key] = nearest(flat(first), flat(training))
        return self._in_pixels[key]

    def logits_of(
        self, images: Images, features: Features | None = None
    ) -> Float[Tensor, "n k"] | None:
        """Returns the classifier's logits, if it has some. features: if they are known already."""
        key = digest(images)
        if key not in self._logits:
            self._logits[key] = (features or self.extract(images)).logits
        return self._logits[key]

    def drawn(self, job: Job, partners: Partners, gallery: Gallery) -> Row:
        """Returns the row of a job, whose images the gallery has or draws."""
        images = _images_of(job, gallery)
        features = self.extract(images)
        pixels, nearness = self.memorised(images, features)
        own = self.logits_of(images, features)

        def against(other: Job | None) -> tuple[float | None, float | None]:
            """Returns squared distance and share of equal classes between both jobs' images."""
            if other is None:
                return None, None
            theirs = _images_of(other, gallery)
            distance = squared_distance(images, theirs)
            if own is None:
                return distance, None
            logits = self.logits_of(theirs)
            return distance, None if logits is None else agreement(own, logits)

        to_teacher, teachers_class = against(partners.teacher)
        to_base, same_class = against(partners.base)
        faint, border = self.background(images)
        return Row(
            name=job.label,
            kind="base" if job.checkpoint.num_steps is None else "student",
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
            base_run="" if partners.base is None else partners.base.checkpoint.name,
            update=job.checkpoint.update,
            guidance=job.guidance,
            faint=faint,
            border=border,
            source=_key_of(job, gallery),
            seed=gallery.seed,
        )

    def draw_nearest(self, path: Path, images: Images) -> None:
        """Writes a picture of the samples closest to a training image, with that image below."""
        if self.real.training is None:
            return
        distances, indices = self.nearest_in_pixels(images, self.real.training)
        closest = distances.argsort()[:PICTURED]
        below = self.real.training[indices[closest]]
        save_png(
            path, make_grid(torch.cat([images[closest], below]), columns=len(closest)), scale=2
        )


def _images_of(job: Job, gallery: Gallery) -> Images:
    way = (job.sampler, job.steps, job.count, job.guidance)
    return gallery.images(job.checkpoint, job.path, *way)


def _key_of(job: Job, gallery: Gallery) -> str:
    return gallery.key(job.checkpoint, job.sampler, job.steps, job.guidance)


# --- a whole comparison ---------------------------------------------------------------------------


def draw_all(jobs: Sequence[Job], gallery: Gallery) -> None:
    """Draws the images of all jobs that the gallery does not have yet, the longest job last."""
    total, done = sum(job.calls for job in jobs), 0
    for job in sorted(jobs, key=lambda j: j.calls):
        begun = time.perf_counter()
        _images_of(job, gallery)
        done += job.calls
        say(
            f"{job.title}: {job.count} images, "
            f"{time.perf_counter() - begun:.0f} s; {done / total:.0%} of all network calls done"
        )


def known_results(output: Path, extract: Extractor, real: RealImages) -> Results | None:
    """Returns the results of earlier calls with this output folder, or None.

    Raises InputError if they were measured with other features or against other real images.
    """
    before = read_results(output / "results.json")
    if before is None:
        return None
    other = None
    if before.features != extract.name:
        other = f"by the features {before.features}"
    elif before.reference.get("features") != extract.identity:
        other = f"by other weights of the features {extract.name}, or by other preprocessing"
    elif before.reference.get("digest") != digest(real.reference):
        other = "against other real images"
    if other is not None:
        raise InputError(f"{output}/results.json: measured {other}; give another --output")
    return before


def measure_all(
    jobs: Sequence[Job],
    files: Mapping[str, Images],
    extract: Extractor,
    real: RealImages,
    gallery: Gallery,
    output: Path,
) -> Results:
    """Measures the images of jobs and of files; writes tables after every row, and a picture.

    A row that an earlier call has measured, with the same weights, is not measured again.
    """
    comparison = Comparison(extract, real)
    about = comparison.about_reference()
    before = known_results(output, extract, real)
    results = Results(extract.name, about, before.rows if before else [])
    known = {(row.key, row.source): row for row in results.rows}

    def add(row: Row) -> None:
        nonlocal results
        say(in_words(row))
        results = results.with_rows([row])
        write_results(output, results)

    for count in sorted({job.count for job in jobs} | {len(images) for images in files.values()}):
        floors = {FLOOR: comparison.floor}
        if real.training is not None:  # digits on black
            floors[NOISY] = comparison.floor_on_noise
        for name in floors if count <= len(real.floor) else ():
            if (Key("", name, "", 0, 0.0, count), "") not in known:
                add(floors[name](count))
    for name, images in files.items():
        missing = (Key("", name, "", 0, 0.0, len(images)), digest(images)) not in known
        picture = output / f"nearest-{name}.png"
        if missing:
            add(comparison.row_of_files(name, images))
        if missing or not picture.exists():
            comparison.draw_nearest(picture, images)
    for job in jobs:
        row = known.get((job.key, _key_of(job, gallery)))
        partners = Partners.of(job, jobs)
        if row is not None and partners.add_to(row):
            add(with_relations_of(row, comparison.drawn(job, partners, gallery)))
        elif row is None:
            add(comparison.drawn(job, partners, gallery))
        named = f"{job.key.run}-{job.key.name}-{job.sampler.replace(':', '-')}-{job.steps}"
        named += f"-guidance-{job.guidance:g}" if job.guidance else ""
        picture = output / f"nearest-{named}.png"
        if real.training is not None and (row is None or not picture.exists()):
            comparison.draw_nearest(picture, _images_of(job, gallery))
    write_results(output, results)  # again, in case an earlier call was stopped here
    draw_distances(output / "distances.png", results)
    return results
