"""The results of an evaluation: tables (terminal, Markdown, CSV, JSON) and a figure."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from evaluation.quality import Quality
from utils.command import InputError
from utils.files import require_regular_file, write_text
from utils.images import save_figure
from utils.terminal import printable

FLOOR = "real images"
DISTILLED = ": distilled"


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
    unless they were distilled with a YAML of another name; update: how far it was trained.
    guidance: the weight of classifier-free guidance. source: a digest of what the images depend on.
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
    update: int = 0
    guidance: float = 0.0
    source: str = ""

    @property
    def key(self) -> "Key":
        """Identifies the row among all rows."""
        count = self.quality.count
        return Key(self.run, self.name, self.sampler, self.steps or 0, self.guidance, count)

    @property
    def curve(self) -> str:
        """The name of the curve that it is a point of."""
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return {
            "student": f"{self.run}{guided}{DISTILLED}",
            "base": f"{self.run}: {self.name}, {self.sampler}{guided}",
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


def write_results(folder: Path, results: Results) -> None:
    """Writes results.json, results.csv, results.md and distances.png."""
    rows = [asdict(row) for row in results.rows]
    values = {"features": results.features, "reference": dict(results.reference), "rows": rows}
    write_text(folder / "results.json", json.dumps(values, indent=1) + "\n")
    picture = "![distances](distances.png)" if by_curve(results) else ""
    parts = (summary(results), markdown(results), picture)
    write_text(folder / "results.md", "\n\n".join(part for part in parts if part) + "\n")
    write_text(folder / "results.csv", _csv(results.rows))
    draw_distances(folder / "distances.png", results)


COLUMNS = {
    "run": lambda r: _cell(r.run),
    "checkpoint": lambda r: _cell(r.name),
    "sampler": lambda r: _cell(r.sampler),
    "steps": lambda r: "" if r.steps is None else str(r.steps),
    "guidance": lambda r: f"{r.guidance:g}" if r.guidance else "",
    "n": lambda r: f"{r.quality.count:,}",
    "Frechet distance": lambda r: f"{r.quality.frechet:.3f} ± {r.quality.frechet_interval:.3f}",
    "kernel distance": lambda r: f"{r.quality.kernel:.4f}",
    "precision": lambda r: f"{r.quality.precision:.3f}",
    "recall": lambda r: f"{r.quality.recall:.3f}",
    "confident": lambda r: _optional(r.quality.confident, ".3f"),
    "rarest, commonest class": lambda r: (
        f"{min(r.quality.classes):.3f}, {max(r.quality.classes):.3f}" if r.quality.classes else ""
    ),
    "to its teacher": lambda r: _optional(r.to_teacher, ".4f"),
    "its teacher's class": lambda r: _optional(r.teachers_class, ".3f"),
    "to the base (at steps)": lambda r: (
        "" if r.to_base is None else f"{r.to_base:.4f} ({r.base_steps})"
    ),
    "the base's class": lambda r: _optional(r.same_class, ".3f"),
    "asked class": lambda r: _optional(r.asked_class, ".3f"),
    "memorised": lambda r: " ".join(
        f"{share:.3f}" for share in (r.memorised_pixels, r.memorised_features) if share is not None
    ),
}


def _cell(text: str) -> str:
    """Escapes a name for a cell of a Markdown table on a terminal."""
    return printable(text).replace("\n", r"\n").replace("|", r"\|")


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(results: Results) -> str:
    """Returns the table without empty columns, and without the run if there is only one."""
    columns = {t: f for t, f in COLUMNS.items() if any(f(row) for row in results.rows)}
    if len({row.run for row in results.rows if row.run}) == 1:
        columns.pop("run")
    numeric = [title not in ("run", "checkpoint", "sampler") for title in columns]
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if right else '---' for right in numeric)}|",
    ]
    lines += [f"| {' | '.join(f(row) for f in columns.values())} |" for row in results.rows]
    return "\n".join(lines)


def finest_base(results: Results, run: str | None = None) -> Row | None:
    """Returns the best-sampled row of the base model of a run, or of any run; None without one.

    That is the longest trained, then the one with the most DDIM steps, then the most samples.
    """
    bases = [r for r in results.rows if (r.kind, r.sampler, r.guidance) == ("base", "ddim", 0.0)]
    ours = [r for r in bases if run in (None, r.run)]
    return max(ours, key=lambda r: (r.update, r.steps or 0, r.quality.count), default=None)


def by_curve(results: Results) -> dict[str, dict[int, Row]]:
    """Returns one row for each curve and step count.

    Those with as many samples as the row of finest_base if possible, otherwise with the most,
    because distances fall with the number of samples.
    """
    finest = finest_base(results)
    wanted = 0 if finest is None else finest.quality.count
    curves: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in sorted(results.rows, key=lambda r: (r.quality.count == wanted, r.quality.count)):
        if row.steps is not None:
            curves[row.curve][row.steps] = row
    return curves


def summary(results: Results) -> str:
    """Returns a table of Frechet distances by sampling steps, with a column for each curve.

    A student's distance is also divided by that of finest_base, if it has as many samples.
    """
    curves, finest = by_curve(results), finest_base(results)
    if finest is None or not any(row.kind == "student" for row in results.rows):
        return ""
    count = finest.quality.count
    titles = sorted(curves, key=lambda title: (not title.endswith(DISTILLED), title))
    lines = [
        f"Frechet distances, n = {count:,} where no other is said; in brackets a student's over "
        "that of its base model at its most steps:",
        "",
        f"| steps | {' | '.join(map(_cell, titles))} |",
        f"|{'---:|' * (len(titles) + 1)}",
    ]
    for steps in sorted({steps for points in curves.values() for steps in points}, reverse=True):
        rows = [curves[title].get(steps) for title in titles]
        cells = ["" if row is None else _distance(row, results, count) for row in rows]
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _distance(row: Row, results: Results, usual_count: int) -> str:
    said = f"{row.quality.frechet:.3f} ± {row.quality.frechet_interval:.3f}"
    base = finest_base(results, row.run)
    if row.kind == "student" and base is not None and base.quality.count == row.quality.count:
        said += f" ({row.quality.frechet / base.quality.frechet:.2f})"
    return said if row.quality.count == usual_count else f"{said}, n = {row.quality.count:,}"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    values = [{**asdict(row), **asdict(row.quality)} for row in rows]
    for value in values:
        value.pop("quality")
        classes = value.pop("classes") or []
        value |= {f"class_{n}": share for n, share in enumerate(classes)}
    names = list(dict.fromkeys(name for value in values for name in value))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def _label(title: str) -> str:
    """Escapes a name for matplotlib, which reads $ as a formula and ignores a leading _."""
    shown = printable(title).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def draw_distances(path: Path, results: Results) -> None:
    """Plots Frechet distances with intervals over sampling steps, and the floor as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    curves = by_curve(results)
    if not curves:
        return
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for title, points in sorted(curves.items()):
        rows = [points[steps] for steps in sorted(points)]
        axes.errorbar(
            sorted(points),
            [row.quality.frechet for row in rows],
            [row.quality.frechet_interval for row in rows],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=2 if title.endswith(DISTILLED) else 1.2,
            label=_label(title),
        )
    floors = {r.quality.count: r.quality.frechet for r in results.rows if r.kind == "floor"}
    if floors:
        finest = finest_base(results)
        count = finest.quality.count if finest and finest.quality.count in floors else max(floors)
        title = f"real images, n = {count:,} (floor)"
        axes.axhline(floors[count], color="grey", linestyle="--", label=title)
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Frechet distance")
    axes.set_xticks(sorted({steps for points in curves.values() for steps in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(path, figure)
