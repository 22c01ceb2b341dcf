"""Figures: the loss of a run, and distances by sampling steps."""

from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from evaluation.results import DISTILLED, Results, by_curve, finest_base
from training.metrics import read_metrics
from utils.images import save_figure
from utils.terminal import printable

APART = 1.06  # the factor between the steps of neighbouring curves in a figure
MARKERS = "os^"

Curves = dict[str, list[tuple[int, float, float]]]
"""By title: (sampling steps, distance, half its interval) of each point."""


def draw_loss_curve(folder: Path) -> None:
    """Plots metrics.jsonl into loss.png, a curve for each stage; nothing if it has no losses.

    The thin line is the loss of every update, the thick one its mean over a fiftieth of the stage.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    metrics = folder / "metrics.jsonl"
    for entry in read_metrics(metrics) if metrics.exists() else []:
        if entry.get("loss") is not None:
            steps = entry.get("num_steps")
            title = str(entry.get("kind", "base model")) if steps is None else f"student {steps}"
            curves[title].append((entry["update"], entry["loss"]))
    if not curves:
        return  # a folder of students alone
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, points in curves.items():
        updates, losses = zip(*points, strict=True)
        (every,) = axes.plot(updates, losses, linewidth=0.5, alpha=0.3)
        width = max(1, len(losses) // 50)
        smooth = torch.tensor(losses).unfold(0, width, 1).mean(1).tolist()
        axes.plot(updates[width - 1 :], smooth, color=every.get_color(), label=title)
    axes.set(xlabel="update of the stage", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(folder / "loss.png", figure)


def _label(title: str) -> str:
    """Escapes a name for matplotlib, which reads $ as a formula and ignores a leading _."""
    shown = printable(title).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def draw_distances(path: Path, results: Results) -> None:
    """Plots the Frechet distances of results over sampling steps, and their floor as a line."""
    curves = {
        title: [
            (steps, row.quality.frechet, row.quality.frechet_interval)
            for steps, row in points.items()
        ]
        for title, points in sorted(by_curve(results).items())
    }
    if not curves:
        return
    floors = {r.quality.count: r.quality.frechet for r in results.rows if r.kind == "floor"}
    floor = None
    if floors:
        finest = finest_base(results)
        count = finest.quality.count if finest and finest.quality.count in floors else max(floors)
        floor = f"real images, n = {count:,} (floor)", floors[count]
    plot_distances(path, curves, floor, {title for title in curves if title.endswith(DISTILLED)})


def plot_distances(
    path: Path,
    curves: Curves,
    floor: tuple[str, float] | None = None,
    thick: Container[str] = (),
) -> None:
    """Writes a picture of draw_curves, with a legend beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5), layout="constrained")
    draw_curves(figure.subplots(), curves, floor, thick)
    figure.legend(loc="outside right upper")  # it would hide points inside
    save_figure(path, figure)


def draw_curves(
    axes: Any, curves: Curves, floor: tuple[str, float] | None = None, thick: Container[str] = ()
) -> None:
    """Plots curves of (sampling steps, distance, half its interval), both axes logarithmic.

    axes: of matplotlib. floor: the name and height of a line. thick: titles of curves. Curves are
    moved apart sideways a little, so that their intervals do not cover each other.
    """
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    for number, (title, points) in enumerate(curves.items()):
        steps, distances, intervals = zip(*sorted(points), strict=True)
        aside = APART ** (number - (len(curves) - 1) / 2)
        axes.errorbar(
            [n * aside for n in steps],
            distances,
            intervals,
            marker=MARKERS[number // 10 % len(MARKERS)],  # there are ten colours
            markersize=4,
            capsize=3,
            linewidth=2 if title in thick else 1.2,
            label=_label(title),
        )
    if floor is not None:
        axes.axhline(floor[1], color="grey", linestyle="--", label=floor[0])
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Frechet distance")
    axes.set_xticks(sorted({steps for points in curves.values() for steps, *_ in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.tick_params(axis="x", labelsize="x-small")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
