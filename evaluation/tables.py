"""The tables of an evaluation: on the terminal, and as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.frechet import Compared, Interval, compare_distances
from evaluation.quality import CONFIDENT
from evaluation.results import DISTILLED, Results, Row, by_curve, finest_base
from utils.files import write_text
from utils.terminal import printable


def write_results(folder: Path, results: Results) -> None:
    """Writes results.json, results.csv and results.md, which shows distances.png."""
    rows = [asdict(row) for row in results.rows]
    values = {"features": results.features, "reference": dict(results.reference), "rows": rows}
    write_text(folder / "results.json", json.dumps(values, indent=1) + "\n")
    picture = "![distances](distances.png)" if by_curve(results) else ""
    parts = (summary(results), markdown(results), picture)
    write_text(folder / "results.md", "\n\n".join(part for part in parts if part) + "\n")
    write_text(folder / "results.csv", _csv(results.rows))


def in_words(row: Row) -> str:
    """Returns a row in words."""
    q = row.quality
    steps = "" if row.steps is None else f", {row.sampler}, {row.steps} steps"
    steps += f", guidance {row.guidance:g}" if row.guidance else ""
    sure = "" if q.confident is None else f", {q.confident:.1%} more than {CONFIDENT:.0%} sure"
    return (
        f"{row.name}{steps}: Frechet distance {q.frechet:.3f} ± {q.frechet_interval:.3f} "
        f"(n = {q.count:,}){sure}"
    )


COLUMNS = {
    "run": lambda r, _: _cell(r.run),
    "checkpoint": lambda r, _: _cell(r.name),
    "sampler": lambda r, _: _cell(r.sampler),
    "steps": lambda r, _: "" if r.steps is None else str(r.steps),
    "guidance": lambda r, _: f"{r.guidance:g}" if r.guidance else "",
    "n": lambda r, _: f"{r.quality.count:,}",
    "Frechet distance": lambda r, _: f"{r.quality.frechet:.3f} ± {r.quality.frechet_interval:.3f}",
    "n → ∞": lambda r, _: optional(r.quality.limit, ".3f"),
    "less its base's": lambda r, results: _compared(r, results, "difference", "+.3f"),
    "over its base's": lambda r, results: _compared(r, results, "ratio", ".2f"),
    "kernel distance": lambda r, _: f"{r.quality.kernel:.4f}",
    "precision": lambda r, _: f"{r.quality.precision:.3f}",
    "recall": lambda r, _: f"{r.quality.recall:.3f}",
    "confident": lambda r, _: optional(r.quality.confident, ".3f"),
    "faint pixels": lambda r, _: optional(r.faint, ".3f"),
    "border": lambda r, _: optional(r.border, ".2f"),
    "rarest, commonest class": lambda r, _: (
        f"{min(r.quality.classes):.3f}, {max(r.quality.classes):.3f}" if r.quality.classes else ""
    ),
    "to its teacher": lambda r, _: optional(r.to_teacher, ".4f"),
    "its teacher's class": lambda r, _: optional(r.teachers_class, ".3f"),
    "to the base (at steps)": lambda r, _: (
        "" if r.to_base is None else f"{r.to_base:.4f} ({r.base_steps})"
    ),
    "the base's class": lambda r, _: optional(r.same_class, ".3f"),
    "asked class": lambda r, _: optional(r.asked_class, ".3f"),
    "memorised": lambda r, _: " ".join(
        f"{share:.3f}" for share in (r.memorised_pixels, r.memorised_features) if share is not None
    ),
}


def against_base(row: Row, results: Results) -> Compared | None:
    """Compares a row's distance with its base model's best (see finest_base), from the same noise.

    None if that has another number of images, or was measured before distances_without was kept.
    """
    alike = (row.quality.count, row.seed)
    bases = [r for r in results.rows if (r.quality.count, r.seed) == alike]
    base = finest_base(Results(results.features, results.reference, bases), row.base_run or row.run)
    if row.steps is None or base is None or base is row:
        return None
    ours, theirs = row.quality, base.quality
    if ours.without is None or theirs.without is None:
        return None
    return compare_distances(ours.frechet, ours.without, theirs.frechet, theirs.without)


def _compared(row: Row, results: Results, which: str, form: str) -> str:
    compared = against_base(row, results)
    if compared is None:
        return ""
    interval: Interval = getattr(compared, which)
    return f"{interval.value:{form}} ± {interval.half:{form.lstrip('+')}}"


def _cell(text: str) -> str:
    """Escapes a name for a cell of a Markdown table on a terminal."""
    return printable(text).replace("\n", r"\n").replace("|", r"\|")


def optional(value: float | None, form: str) -> str:
    """Returns a number in that form, or nothing for None."""
    return "" if value is None else format(value, form)


def markdown(results: Results) -> str:
    """Returns the table without empty columns, and without the run if there is only one."""
    columns = {t: f for t, f in COLUMNS.items() if any(f(row, results) for row in results.rows)}
    if len({row.run for row in results.rows if row.run}) == 1:
        columns.pop("run")
    numeric = [title not in ("run", "checkpoint", "sampler") for title in columns]
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if right else '---' for right in numeric)}|",
    ]
    lines += [
        f"| {' | '.join(f(row, results) for f in columns.values())} |" for row in results.rows
    ]
    return "\n".join(lines)


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
        f"Frechet distances (n = {count:,} unless another is named); in brackets, a student's "
        f"divided by that of its base model in {finest.steps} steps of DDIM:",
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
    base = finest_base(results, row.base_run or row.run)
    if row.kind == "student" and base is not None and base.quality.count == row.quality.count:
        said += f" ({row.quality.frechet / base.quality.frechet:.2f})"
    return said if row.quality.count == usual_count else f"{said}, n = {row.quality.count:,}"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    values = [{**asdict(row), **asdict(row.quality)} for row in rows]
    for value in values:
        value.pop("quality")
        value.pop("without")
        classes = value.pop("classes") or []
        value |= {f"class_{n}": share for n, share in enumerate(classes)}
    names = list(dict.fromkeys(name for value in values for name in value))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()
