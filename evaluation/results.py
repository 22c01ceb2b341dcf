"""The results of an evaluation: rows, kept in results.json, and how they belong together."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from evaluation.quality import Quality
from utils.command import InputError
from utils.files import require_regular_file

FLOOR = "real images"
NOISY = "real images on noise"  # of 0 .. 6 of 255
DISTILLED = ", distilled"


class Key(NamedTuple):
    """Identifies a row: the run, its checkpoint, how it was sampled, the number of images."""

    run: str
    name: str
    sampler: str
    steps: int
    guidance: float
    images: int


@dataclass(frozen=True)
class Row:
    """The measurements of one set of images.

    name: the checkpoint's file, or the images'. kind: base, student, images (from files) or floor
    (real images). to_teacher, to_base: mean squared distance, in the model's range and from the
    same noise, to the images of the student's teacher, and of the base model at base_steps, its
    most steps. teachers_class, same_class: the share of images with the same class as theirs;
    asked_class: with the class that a conditional model was given. memorised: the share of samples
    nearer to a training image than all but 1% of real images, in pixels and in features; slightly
    more than 1% is no proof, because the real images are test images and the classifier has seen
    most training images. run: the checkpoint's name, which students and their base model share
    unless they were distilled with a YAML of another name; base_run: that of the base model that it
    was compared with; update: how far it was trained.
    guidance: the weight of classifier-free guidance. faint, border: see quality.background; of
    digits alone. source: a digest of what the images depend on. seed: of the noise.
    """

    name: str
    kind: Literal["base", "student", "images", "floor"]
    sampler: str
    steps: int | None
    quality: Quality
    to_teacher: float | None = None
    teachers_class: float | None = None
    to_base: float | None = None
    same_class: float | None = None
    asked_class: float | None = None
    memorised_pixels: float | None = None
    memorised_features: float | None = None
    base_steps: int | None = None
    run: str = ""
    base_run: str = ""
    update: int = 0
    guidance: float = 0.0
    faint: float | None = None
    border: float | None = None
    source: str = ""
    seed: int = 0

    @property
    def key(self) -> "Key":
        """Identifies the row among all rows."""
        count = self.quality.count
        return Key(self.run, self.name, self.sampler, self.steps or 0, self.guidance, count)

    @property
    def curve(self) -> str:
        """The name that the curve of which it is a point has among those of its run.

        Students are on one if their names differ only in the number of steps. One that is sampled
        in several has its own.
        """
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        ladder = self.name
        if self.sampler != "consistency":
            ladder = re.sub(r"-\d+(-steps?)?(?=$|, )", "", ladder)  # "student-8, bf16"
        return {
            "student": f"{ladder}{guided}{DISTILLED}",
            "base": f"{self.name}, {self.sampler}{guided}",
        }.get(self.kind, self.name)


@dataclass(frozen=True)
class Results:
    """All rows of a folder. features: the extractor's name; reference: about the real images."""

    features: str
    reference: Mapping[str, Any]
    rows: Sequence[Row]

    def with_rows(self, rows: Sequence[Row]) -> "Results":
        """Returns the results with these rows added, or put in place of those with the same key.

        Rows of the same checkpoint and sampling but other weights or noise are removed.
        """
        new = {row.key[:-1]: row.source for row in rows}
        old = [row for row in self.rows if new.get(row.key[:-1], row.source) == row.source]
        merged = {row.key: row for row in [*old, *rows]}
        order = {"floor": 0, "images": 1, "base": 2, "student": 3}
        ordered = sorted(
            merged.values(),
            key=lambda r: (
                *(order[r.kind], r.sampler, -(r.steps or 0), r.name, r.guidance),
                -r.quality.count,
            ),
        )
        return Results(self.features, self.reference, ordered)


def read_results(path: Path) -> Results | None:
    """Returns the results in the file, None if there is none. Raises InputError if damaged."""
    if not path.exists():
        return None
    require_regular_file(path)
    try:
        values = json.loads(path.read_text())
        return TypeAdapter(Results).validate_python(values)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: damaged; delete it to measure anew") from None


def with_relations_of(before: Row, row: Row) -> Row:
    """Returns the row with the relations an earlier call measured to jobs that are missing now."""
    if row.to_teacher is None:
        row = replace(row, to_teacher=before.to_teacher, teachers_class=before.teachers_class)
    if (row.base_steps or 0) < (before.base_steps or 0):
        keys = ("to_base", "same_class", "base_steps", "base_run")
        row = replace(row, **{key: getattr(before, key) for key in keys})
    return row


def finest_base(results: Results, run: str | None = None) -> Row | None:
    """Returns the best-sampled row of the base model of a run, or of any run; None without one.

    That is the longest trained, then one with as many samples as a student, then the one with the
    most DDIM steps, then one with as many samples as most rows have, then the most samples.
    """
    ours = [r for r in results.rows if run in (None, r.run)]
    counts = {r.quality.count for r in ours if r.kind == "student"}
    rows = Counter(r.quality.count for r in ours)
    bases = [r for r in ours if (r.kind, r.sampler, r.guidance) == ("base", "ddim", 0.0)]

    def rank(row: Row) -> tuple[int, bool, int, int, int]:
        count = row.quality.count
        return row.update, count in counts, row.steps or 0, rows[count], count

    return max(bases, key=rank, default=None)


def by_curve(results: Results) -> dict[str, dict[int, Row]]:
    """Returns one row for each curve and step count, by the name of the curve.

    Where rows of two runs would be the same point of a curve, or have other base models, the name
    has the run in front. A row has as many samples as that of finest_base if there is one,
    otherwise the most, because distances fall with the number of samples.
    """
    finest = finest_base(results)
    wanted = 0 if finest is None else finest.quality.count
    points: dict[str, set[tuple[str, str, int]]] = defaultdict(set)
    rows = [row for row in results.rows if row.steps is not None]
    for row in rows:
        points[row.curve].add((row.base_run or row.run, row.run, row.steps or 0))
    curves: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: (r.quality.count == wanted, r.quality.count)):
        bases, _, steps = zip(*points[row.curve], strict=True)
        apart = len(set(bases)) > 1 or len(set(steps)) < len(steps)
        curves[f"{row.run}: {row.curve}" if apart else row.curve][row.steps or 0] = row
    return curves
