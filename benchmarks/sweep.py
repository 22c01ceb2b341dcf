"""Compares variants of a recipe in equal CPU time: python -m benchmarks.sweep NAME.

Each variant is trained by train.py or distill.py for as many updates as fit into the same CPU time
of one thread (timed on a few updates of its own), and its samples are measured. With --updates, a
base model is trained for so many instead, on any device. Run the same command again to go on.
Several processes may run it side by side: each takes a variant that no other one is working on.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

import distill
import train
from benchmarks.measures import Measurer, Rows, Trained, locked
from benchmarks.sweeps import SWEEPS, Sweep
from benchmarks.timing import timed_stages
from evaluation.curves import plot_distances
from evaluation.frechet import compare_distances
from evaluation.tables import optional
from pipeline.checkpoint import Checkpoint, digest
from pipeline.config import Config, load_config
from pipeline.latents import with_codec
from training.ladder import distillation_config
from training.metrics import read_metrics
from training.stage import base_stage
from utils.command import (
    GO_ON,
    INTERRUPTED,
    OK,
    InputError,
    Stopped,
    add_device_argument,
    path_name,
    run_script,
    say,
    whole_number,
)
from utils.files import write_text
from utils.processes import choose_device

AGAIN = "-again"  # ends the name of a variant's second run
TEACHER = "teacher"  # the name of the row of the students' teacher


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("name", choices=SWEEPS, help="; ".join(f"{name}: {s.about}" for name, s in SWEEPS.items()))
    add("--only", nargs="+", metavar="VARIANT", help="some of the variants")
    add("--checkpoint", type=path_name, metavar="TEACHER.pt", help="the teacher of all students")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=whole_number(1, 2**20), help="of CPU time, each variant")
    budget.add_argument("--updates", type=whole_number(1, 2**31), help="of base models, instead")
    add(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="in all variants"
    )
    add("--count", type=whole_number(20, 10**7), help="samples of each")
    add("--output", type=path_name, metavar="DIR", help="by default output/NAME")
    add("--table", action="store_true", help="only print what is known so far")
    add_device_argument(parser)
    parser.set_defaults(device="cpu")
    return run_script(parser, argv, compare, GO_ON)


def compare(arguments: argparse.Namespace) -> None:
    """Trains and measures the variants, the best ones with a second seed too; prints the table."""
    torch.set_num_threads(1)
    sweep = SWEEPS[arguments.name]
    for name in arguments.only or ():
        if name not in sweep.variants:
            known = ", ".join(sweep.variants)
            raise InputError(f"--only {name}: no variant of {arguments.name}; take {known}")
    teacher = None if sweep.base else arguments.checkpoint or sweep.teacher
    if not (sweep.base or teacher or arguments.table):
        raise InputError(f"--checkpoint: missing; name the teacher of {arguments.name}")
    if sweep.base and arguments.checkpoint:
        raise InputError(f"--checkpoint: {arguments.name} trains its base models; leave it out")
    if arguments.updates and (sweep.base is None or sweep.students is not None):
        raise InputError(f"--updates: {arguments.name} has students; give --seconds instead")
    if arguments.device != "cpu" and not arguments.updates:
        raise InputError("--device: time is that of the CPU; on another device give --updates")
    budget = {"seconds": arguments.seconds or sweep.seconds}
    if arguments.updates:
        budget = {"updates": arguments.updates}
    bench = Bench(
        replace(sweep, common=[*sweep.common, *arguments.set]),
        teacher,
        budget,
        arguments.count or sweep.count,
        arguments.output or Path("output") / arguments.name,
        choose_device(arguments.device),
    )
    if not arguments.table:
        bench.measure_teacher()
        wanted = arguments.only or list(sweep.variants)
        for name in wanted:
            bench.run(name, sweep.variants[name])
        for name in bench.best(sweep.repeated):
            if name in wanted:
                bench.run(name + AGAIN, [*sweep.variants[name], "seed=1"])
    results = bench.results()
    if curves := curves_of(results):
        plot_distances(bench.output / "distances.png", curves)
        say(f"written: {bench.output / 'distances.png'}")
    say(table(sweep, results))


@dataclass(frozen=True)
class Bench:
    """A sweep that runs. teacher: file of the students' teacher; None where base models train.

    budget: of each variant: {"seconds": of CPU time} or {"updates": their number}.
    """

    sweep: Sweep
    teacher: Path | None
    budget: dict[str, int]
    count: int
    output: Path
    device: torch.device

    @cached_property
    def measurer(self) -> Measurer:
        """Measures what was trained."""
        return Measurer(self.sweep, self.teacher, self.count, self.output, self.device)

    # --- what is known ----------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """What a result depends on, beside the variant."""
        teacher = self.measurer.taught_by
        return {
            **self.budget,
            "samples": self.count,
            "steps": list(self.sweep.steps),
            "values": self.sweep.common,
            "teacher": None if teacher is None else digest(teacher.weights),
        }

    def result(self, name: str) -> Rows | None:
        """The rows of a variant, none if its training diverged, None if it has not run."""
        path = self.output / name / "result.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result["measure"] != self.measure():
            was = ", ".join(f"{value} {key}" for key, value in result["measure"].items())
            raise InputError(
                f"{path}: of {was}; ask for the same (--seconds, --updates, --count, --checkpoint, "
                "--set), or give another --output"
            )
        return result["rows"]  # type: ignore[no-any-return]

    def results(self) -> dict[str, Rows]:
        """The rows of all variants that have run."""
        names = [n for name in self.sweep.variants for n in (name, name + AGAIN)]
        names += [] if self.sweep.base else [TEACHER]
        found = {name: self.result(name) for name in names}
        return {name: rows for name, rows in found.items() if rows is not None}

    def best(self, count: int) -> list[str]:
        """The variants of the smallest distances, once all have run."""
        known, names = self.results(), self.sweep.variants
        if not all(name in known for name in names):
            return []
        trained = [name for name in names if known[name]]
        return sorted(trained, key=lambda name: known[name][0]["frechet"])[:count]

    # --- training ---------------------------------------------------------------------------------

    def run(self, name: str, changes: list[str]) -> None:
        """Trains and measures a variant, unless it is known or another process works on it."""
        with locked(self.output / "locks" / name, wait=False) as alone:
            if not alone:
                return
            folder = self.output / name
            trained = self.train(folder, changes)
            if self.result(name) is None:
                result = {"measure": self.measure(), "rows": self.rows(folder, trained)}
                write_text(folder / "result.json", json.dumps(result) + "\n")

    def measure_teacher(self) -> None:
        """Measures the students' teacher, if it is not known yet."""
        teacher = self.measurer.taught_by
        if teacher is None or self.teacher is None:
            return
        with locked(self.output / "locks" / TEACHER, wait=False) as alone:
            if alone and self.result(TEACHER) is None:
                row = self.measurer.teacher_row(self.teacher, teacher)
                result = {"measure": self.measure(), "rows": [row]}
                write_text(self.output / TEACHER / "result.json", json.dumps(result) + "\n")

    def rows(self, folder: Path, trained: list[Trained]) -> Rows:
        """Measures what was trained; trains and measures the students of it too, if asked for."""
        rows = [row for one in trained for row in self.measurer.rows(one)]
        if trained and self.sweep.students is not None:
            sweep, teacher = self.sweep.students, trained[-1].path
            taught = replace(self, sweep=sweep, teacher=teacher)
            folder = folder / "students"
            rows += taught.rows(folder, taught.train(folder, []))
        return rows

    def train(self, folder: Path, changes: list[str]) -> list[Trained]:
        """Trains a variant to its end; returns its checkpoints, none if it diverged."""
        given = self.overrides(changes)
        stages = self.plan(folder, given)
        updates = [stage["updates"] for stage in stages]
        command = ["--output", str(folder), "--device", str(self.device)]
        if self.teacher is None:
            main, files = train.main, [f"diffusion-{updates[0]}.pt"]
            command += ["--config_path", str(self.sweep.base), "--set", *given]
            command += [f"training.updates={updates[0]}", "training.checkpoint_every=1000000"]
        else:
            main, files = distill.main, [f"student-{stage['num_steps']}.pt" for stage in stages]
            command += ["--teacher_model_checkpoint", str(self.teacher), "--set", *given]
            command += [f"distillation.updates_per_stage={updates}"]
        if not (folder / files[-1]).exists() and not (folder / "diverged").exists():
            code = main(command)
            if code == INTERRUPTED:
                raise Stopped
            if code != OK:
                require_diverged(folder)
                write_text(folder / "diverged", "")
        if (folder / "diverged").exists():
            return []
        images = [stage["updates"] * stage["batch_size"] for stage in stages]
        calls = [n * stage["calls"] for n, stage in zip(images, stages, strict=True)]
        sums = zip(*map(accumulate, (updates, images, calls)), strict=True)
        return [Trained(folder / file, *s) for file, s in zip(files, sums, strict=True)]

    def overrides(self, changes: list[str]) -> list[str]:
        """All values of the config that a variant sets. Students halve the steps by default."""
        if self.measurer.taught_by is None:
            return [*self.sweep.common, *changes]
        ladder = ["distillation.ladder=null", "distillation.iterations=1"]
        if (steps := self.measurer.taught_by.num_steps) is not None:
            ladder.append(f"distillation.first_steps={max(1, steps // 2)}")
        return [*ladder, "distillation.updates_per_stage=1", *self.sweep.common, *changes]

    def plan(self, folder: Path, overrides: list[str]) -> Rows:
        """The stages of a variant with the updates that its budget allows; kept in plan.json.

        Stages share the time in proportion to the updates that the config gives them.
        """
        path = folder / "plan.json"
        teacher = self.measurer.taught_by
        weights = None if teacher is None else digest(teacher.weights)
        made_for = {**self.budget, "teacher": weights, "overrides": overrides}
        if not path.exists():
            stages = self.stages(self.config(overrides), teacher)
            write_text(path, json.dumps({"made_for": made_for, "stages": stages}) + "\n")
        plan = json.loads(path.read_text())
        for key, value in made_for.items():
            if plan["made_for"].get(key) != value:
                raise InputError(f"{path}: made for other {key}; give another --output")
        return plan["stages"]  # type: ignore[no-any-return]

    def stages(self, config: Config, teacher: Checkpoint | None) -> Rows:
        """The stages of a config, each with its number of updates."""
        if (updates := self.budget.get("updates")) is not None:
            stage = base_stage(config)
            return [{"updates": updates, "batch_size": stage.batch_size, "calls": 1}]
        seconds = self.budget["seconds"]
        stages = timed_stages(config, teacher, seconds / 30)
        total = sum(stage["updates"] * stage["seconds"] for stage in stages)
        return [
            stage | {"updates": max(1, int(stage["updates"] * seconds / total))} for stage in stages
        ]

    def config(self, overrides: list[str]) -> Config:
        """The config of a variant."""
        if self.measurer.taught_by is None or self.teacher is None:
            path = self.sweep.base or Path()
            return with_codec(load_config(path, overrides), path)
        return distillation_config(self.measurer.taught_by, self.teacher, None, overrides)


def require_diverged(folder: Path) -> None:
    """Raises InputError unless a training ended because its gradients were not finite."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if not (lines and lines[-1].get("skipped")):
        raise InputError(f"{folder}: training ended before its time")


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {
    "sampler": lambda r: r["sampler"],
    "steps": lambda r: str(r["steps"]),
    "parameters": lambda r: f"{r['parameters']:,}",
    "ms an image": lambda r: optional(r.get("milliseconds"), ".2f"),
    "updates": lambda r: f"{r['updates']:,}",
    "images seen": lambda r: f"{r['images']:,}",
    "network calls": lambda r: f"{r['calls']:,}",
    "loss around update 1,000 -> at the end": lambda r: " -> ".join(
        optional(loss, ".4f") for loss in r["losses"]
    ),
    "Frechet distance": lambda r: f"{r['frechet']:.2f} ± {r['interval']:.2f}",
    "difference": lambda r: r.get("difference", ""),
    "distance to the teacher's samples": lambda r: optional(r["to_teacher"], ".5f"),
    "loss on test images": lambda r: optional(r["held_out"], ".6f"),
    "more than 90% sure": lambda r: optional(r["confident"], ".3f"),
    "recall": lambda r: optional(r.get("recall"), ".3f"),
    "pixels in 1 .. 30": lambda r: optional(r.get("faint"), ".3f"),
}
ONLY_IF_VARIED = ("sampler", "steps", "parameters")


def table(sweep: Sweep, results: dict[str, Rows]) -> str:
    """All rows as Markdown, by steps and distance, without the columns that say nothing.

    difference: of the distance from that of the variant compared with at as many steps.
    """
    known = {row["steps"]: row for row in results.get(sweep.compared_with, [])}
    rows = [(name, row) for name, found in results.items() for row in found]
    rows.sort(key=lambda pair: (-pair[1]["steps"], pair[1]["frechet"]))
    for name, row in rows:
        if row["steps"] in known and name != sweep.compared_with:
            row["difference"] = difference(row, known[row["steps"]])
    columns = {}
    for title, cell in COLUMNS.items():
        cells = [cell(row) for _, row in rows]
        if any(cells) and (len(rows) == 1 or title not in ONLY_IF_VARIED or len(set(cells)) > 1):
            shown = f"less that of {sweep.compared_with}" if title == "difference" else title
            columns[shown] = cells
    lines = [f"| variant | changes | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for n, (name, _) in enumerate(rows):
        cells = [column[n] for column in columns.values()]
        lines.append(f"| {name} | {changes_of(sweep, name)} | {' | '.join(cells)} |")
    for name in [name for name, found in results.items() if not found]:
        lines.append(
            f"| {name} | {changes_of(sweep, name)} | diverged |{' |' * (len(columns) - 1)}"
        )
    return "\n".join(lines)


def curves_of(results: dict[str, Rows]) -> dict[str, list[tuple[int, float, float]]]:
    """The distances of variants by steps, and their intervals; none if all have as many steps."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for name, rows in results.items():
        alone = len({row["sampler"] for row in rows}) == 1
        for row in rows:
            title = name if alone else f"{name}, {row['sampler']}"
            curves.setdefault(title, []).append((row["steps"], row["frechet"], row["interval"]))
    return curves if len({point[0] for points in curves.values() for point in points}) > 1 else {}


def difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The difference of two distances over the same noise, with its 95% interval."""
    a, b = ((one["frechet"], one["without"]) for one in (row, other))
    value, half = compare_distances(*a, *b).difference
    return f"{value:+.2f} ± {half:.2f}"


def changes_of(sweep: Sweep, name: str) -> str:
    """What a variant changes, without the sections."""
    if name == TEACHER:
        return ""
    changes = sweep.variants[name.removesuffix(AGAIN)]
    seed = ["seed=1"] if name.endswith(AGAIN) else []
    keys_and_values = [change.partition("=") for change in [*changes, *seed]]
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in keys_and_values)


if __name__ == "__main__":
    sys.exit(main())
