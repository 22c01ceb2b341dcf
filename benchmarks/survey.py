"""Draws the table of all methods in docs/methods.md: python -m benchmarks.survey"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from evaluation.curves import Curves, draw_curves
from evaluation.results import FLOOR
from utils.command import InputError, path_name, run_script, say
from utils.images import save_figure

HEADING = "## Every method in one table"


class Panel(NamedTuple):
    """Rows of the table that can stand side by side, as their images are of one number."""

    title: str
    curves: Curves
    floor: float | None


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and draws. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--table", type=path_name, default=Path("docs/methods.md"), metavar="FILE.md")
    add("--output", type=path_name, default=Path("docs/survey.png"), metavar="FILE.png")
    return run_script(parser, argv, draw)


def draw(arguments: argparse.Namespace) -> None:
    """Draws the panels side by side, with one scale of distances."""
    from matplotlib.figure import Figure

    panels = panels_of(arguments.table.read_text())
    if not panels:
        raise InputError(f'{arguments.table}: no table of methods under "{HEADING}"')
    figure = Figure(figsize=(14, 8), layout="constrained")
    several = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, curves, floor) in zip(several, panels, strict=True):
        draw_curves(axes, curves, None if floor is None else (FLOOR, floor))
        axes.set_title(title, fontsize="medium")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize="small")
    for axes in several[1:]:
        axes.set_ylabel("")
    save_figure(arguments.output, figure)
    say(f"written: {arguments.output}")


def panels_of(document: str) -> list[Panel]:
    """Returns a panel for each block of the table but the last one, which is of other teachers."""
    panels: list[Panel] = []
    for line in re.findall(r"(?m)^\| .*", document.partition(HEADING)[2].partition("\n\n- ")[0]):
        method, steps, _, distance = [cell.strip() for cell in line.split("|")[1:5]]
        if method.startswith("**"):
            panels.append(Panel(method.strip("*"), {}, None))
        elif panels and method == FLOOR:
            panels[-1] = panels[-1]._replace(floor=float(distance.split()[0]))
        elif panels:
            value, interval = map(float, distance.split(" ± "))
            name = re.sub(r"^\d+:1 in one stage", "k:1 in one stage", method.replace("`", ""))
            panels[-1].curves.setdefault(name, []).append((int(steps), value, interval))
    return panels[:-1]


if __name__ == "__main__":
    sys.exit(main())
