"""Compares variants of a recipe in equal CPU time: python -m benchmarks.sweep NAME.

Each variant is trained by train.py or distill.py for as many updates as fit into the same CPU time
of one thread (timed on a few updates of its own), and its samples are measured. Run the same
command again to go on. Several processes may run it side by side: each takes a variant that no
other one is working on.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sweeps import SWEEPS, Sweep
from utils.command import (
    GO_ON,
    INTERRUPTED,
    OK,
    InputError,
    Stopped,
    parse,
    path_name,
    run_command,
    say,
    whole_number,
)
from utils.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.features import Extractor, Features
    from pipeline.checkpoint import Checkpoint
    from pipeline.config import Config
    from training.stage import Stage
    from training.stages import Run

JACKKNIFE = 10  # sets of noise
STUDENT_T = 2.262  # of 95%, for ten sets
HELD_OUT = 2000  # test images
AGAIN = "-again"  # ends the name of a variant's second run
Rows = list[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("name", choices=SWEEPS, help="; ".join(f"{name}: {s.about}" for name, s in SWEEPS.items()))
    add("--only", nargs="+", metavar="VARIANT", help="some of the variants")
    add("--checkpoint", type=path_name, metavar="TEACHER.pt", help="the teacher of all students")
    add("--seconds", type=whole_number(1, 2**20), help="of CPU time for each variant")
    add("--count", type=whole_number(20, 10**7), help="samples of each")
    add("--output", type=path_name, metavar="DIR", help="by default output/NAME")
    add("--table", action="store_true", help="only print what is known so far")
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: compare(arguments), GO_ON)


def compare(arguments: argparse.Namespace) -> None:
    """Trains and measures the variants, the best ones with a second seed too; prints the table."""
    sweep = SWEEPS[arguments.name]
    for name in arguments.only or ():
        if name not in sweep.variants:
            known = ", ".join(sweep.variants)
            raise InputError(f"--only {name}: no variant of {arguments.name}; take {known}")
    teacher = None if sweep.base else arguments.checkpoint or sweep.teacher
    if not (sweep.base or teacher or arguments.table):
        raise InputError(f"--checkpoint: missing; name the teacher of {arguments.name}")
    bench = Bench(
        sweep,
        teacher,
        arguments.seconds or sweep.seconds,
        arguments.count or sweep.count,
        arguments.output or Path("output") / arguments.name,
    )
    if not arguments.table:
        wanted = arguments.only or list(sweep.variants)
        for name in wanted:
            bench.run(name, sweep.variants[name])
        for name in bench.best(sweep.repeated):
            if name in wanted:
                bench.run(name + AGAIN, [*sweep.variants[name], "seed=1"])
    say(table(sweep, bench.results()))


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a variant, and what it took with all the students before it."""

    path: Path
    updates: int
    images: int
    calls: int


@dataclass(frozen=True)
class Bench:
    """A sweep that runs. teacher: file of the students' teacher; None where base models train."""

    sweep: Sweep
    teacher: Path | None
    seconds: int
    count: int
    output: Path

    # --- what is known ----------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """What a result depends on, beside the variant and the teacher."""
        return {"seconds": self.seconds, "samples": self.count, "steps": list(self.sweep.steps)}

    def result(self, name: str) -> Rows | None:
        """The rows of a variant, none if its training diverged, None if it has not run."""
        path = self.output / name / "result.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result["measure"] != self.measure():
            was = ", ".join(f"{value} {key}" for key, value in result["measure"].items())
            raise InputError(
                f"{path}: of {was}; ask for the same (--seconds, --count), or give another --output"
            )
        return result["rows"]  # type: ignore[no-any-return]

    def results(self) -> dict[str, Rows]:
        """The rows of all variants that have run."""
        names = [n for name in self.sweep.variants for n in (name, name + AGAIN)]
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
                rows = [row for one in trained for row in self.rows(one)]
                result = {"measure": self.measure(), "rows": rows}
                write_text(folder / "result.json", json.dumps(result) + "\n")

    def train(self, folder: Path, changes: list[str]) -> list[Trained]:
        """Trains a variant to its end; returns its checkpoints, none if it diverged."""
        import torch

        import distill
        import train

        torch.set_num_threads(1)
        given = self.overrides(changes)
        stages = self.plan(folder, given)
        updates = [stage["updates"] for stage in stages]
        command = ["--output", str(folder), "--device", "cpu"]
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
        if self.taught_by is None:
            return [*self.sweep.common, *changes]
        ladder = ["distillation.ladder=null", "distillation.iterations=1"]
        if (steps := self.taught_by.num_steps) is not None:
            ladder.append(f"distillation.first_steps={max(1, steps // 2)}")
        return [*ladder, "distillation.updates_per_stage=1", *self.sweep.common, *changes]

    @cached_property
    def taught_by(self) -> "Checkpoint | None":
        """The teacher's checkpoint."""
        from pipeline.checkpoint import load_checkpoint

        return None if self.teacher is None else load_checkpoint(self.teacher)

    def plan(self, folder: Path, overrides: list[str]) -> Rows:
        """The stages of a variant with the updates that fit into the time; kept in plan.json.

        Stages share the time in proportion to the updates that the config gives them.
        """
        from pipeline.checkpoint import digest

        path = folder / "plan.json"
        teacher = None if self.taught_by is None else digest(self.taught_by.weights)
        made_for = {"seconds": self.seconds, "teacher": teacher, "overrides": overrides}
        if not path.exists():
            stages = timed_stages(self.config(overrides), self.taught_by, self.seconds / 30)
            total = sum(stage["updates"] * stage["seconds"] for stage in stages)
            for stage in stages:
                stage["updates"] = max(1, int(stage["updates"] * self.seconds / total))
            write_text(path, json.dumps({"made_for": made_for, "stages": stages}) + "\n")
        plan = json.loads(path.read_text())
        for key, value in made_for.items():
            if plan["made_for"][key] != value:
                raise InputError(f"{path}: made for other {key}; give another --output")
        return plan["stages"]  # type: ignore[no-any-return]

    def config(self, overrides: list[str]) -> "Config":
        """The config of a variant."""
        from pipeline.config import load_config
        from training.ladder import distillation_config

        if self.taught_by is None or self.teacher is None:
            return load_config(self.sweep.base or Path(), overrides)
        return distillation_config(self.taught_by, self.teacher, None, overrides)

    # --- measuring --------------------------------------------------------------------------------

    def rows(self, trained: Trained) -> Rows:
        """What is measured of a checkpoint: a row for each way of sampling it."""
        from pipeline.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(trained.path)
        about = {
            "parameters": sum(tensor.numel() for tensor in checkpoint.model.values()),
            "updates": trained.updates,
            "images": trained.images,
            "calls": trained.calls,
            "losses": losses_of(trained.path.parent) if self.teacher is None else [],
            "held_out": self.held_out_loss(checkpoint) if self.sweep.held_out else None,
        }
        return [
            {**about, "sampler": sampler, "steps": steps}
            | self.quality(trained.path, checkpoint, sampler, steps)
            for sampler, steps in ways_to_sample(self.sweep, checkpoint)
        ]

    def quality(
        self, path: Path, checkpoint: "Checkpoint", sampler: str, steps: int
    ) -> dict[str, Any]:
        """The distances of samples to real images and to the teacher's from the same noise.

        without: the Frechet distances without each of ten equal sets of the samples.
        """
        import torch

        from evaluation.quality import frechet_distance, measure
        from pipeline.codec import encode

        extract, reference = self.extractor
        images = self.samples(path, checkpoint, sampler, steps)
        features = extract(images)
        quality = measure(features, reference)
        sets = features.values[: self.count - self.count % JACKKNIFE].chunk(JACKKNIFE)
        parts = [torch.cat([*sets[:n], *sets[n + 1 :]]) for n in range(JACKKNIFE)]
        distance = None
        if self.teacher is not None and self.taught_by is not None:
            ladder = checkpoint.config.distillation.steps()
            way = (self.taught_by.sampler or "ddim", self.taught_by.num_steps or ladder[0])
            theirs = self.samples(self.teacher, self.taught_by, *way)
            distance = (encode(images) - encode(theirs)).square().mean().item()
        return {
            "frechet": quality.frechet,
            "interval": quality.frechet_interval,
            "without": [frechet_distance(part, reference.values) for part in parts],
            "confident": quality.confident,
            "to_teacher": distance,
        }

    def samples(self, path: Path, checkpoint: "Checkpoint", sampler: str, steps: int) -> "Tensor":
        """Samples, drawn on the CPU; those of all checkpoints start from the same noise."""
        import torch

        from evaluation.gallery import Gallery
        from utils.processes import World

        where = "teacher" if path == self.teacher else path.parent.name
        gallery = Gallery(self.output / "samples" / where, World(torch.device("cpu")), 0, 125)
        with locked(self.output / "locks" / f"samples-{where}", wait=True):
            return gallery.images(checkpoint, path, sampler, steps, self.count)

    @cached_property
    def real(self) -> "Tensor":
        """The real images."""
        from evaluation.gallery import real_images

        config = self.config([]) if self.taught_by is None else self.taught_by.config
        return real_images(config).reference

    @cached_property
    def extractor(self) -> "tuple[Extractor, Features]":
        """The extractor of features, and those of the real images."""
        import torch

        from evaluation.features import make_extractor

        extract = make_extractor("digits", torch.device("cpu"))
        return extract, extract(self.real, "features of real images")

    def held_out_loss(self, student: "Checkpoint") -> float:
        """The loss, weighted by max(1, SNR), on test images, with the same draws for all."""
        import torch

        from diffusion.losses import SQUARED_ERRORS
        from diffusion.objectives import distillation_objective
        from diffusion.paths import neighbours
        from pipeline.build import load_denoiser
        from pipeline.codec import encode
        from utils.randomness import generator

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


def ways_to_sample(sweep: Sweep, checkpoint: "Checkpoint") -> list[tuple[str, int]]:
    """The samplers and step counts by which a checkpoint is measured.

    A student is sampled in its own steps, one of consistency distillation in any number.
    """
    if checkpoint.num_steps is None:
        return [(name, n) for name in sweep.samplers for n in sweep.steps]
    sampler = checkpoint.sampler or "ddim"
    own = sweep.steps if sampler == "consistency" else (checkpoint.num_steps,)
    return [(sampler, n) for n in own if n in (sweep.steps or own)]


def require_diverged(folder: Path) -> None:
    """Raises InputError unless a training ended because its gradients were not finite."""
    from training.metrics import read_metrics

    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if not (lines and lines[-1].get("skipped")):
        raise InputError(f"{folder}: training ended before its time")


def losses_of(folder: Path) -> list[float]:
    """The mean loss of the updates 850 to 1,150, if there are any, and of the last tenth."""
    from training.metrics import read_metrics

    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    parts = losses[850:1150] or losses[:1], losses[-max(1, len(losses) // 10) :]
    return [statistics.mean(part) for part in parts]


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Locks the folder among processes. Yields whether that succeeded, with wait always True."""
    from training.folder import kept_to_itself

    while True:
        with kept_to_itself(folder) as alone:
            if alone or not wait:
                yield alone
                return
        time.sleep(5)


# --- timing ---------------------------------------------------------------------------------------


def timed_stages(config: "Config", teacher: "Checkpoint | None", seconds: float) -> Rows:
    """The stages of a config with the CPU time and the network calls of an update of each.

    calls: for each image. seconds: of CPU time that the measurement of a stage may take.
    """
    import torch

    from pipeline.build import build_dataset
    from training.stage import base_stage, student_stages
    from training.stages import Run, base_start, student_start, teacher_grid, teachers_choice
    from utils.processes import World

    world = World(torch.device("cpu"))
    run = Run(config, "timed", Path("timed"), world, build_dataset(config, world.device))
    stages = [base_stage(config)] if teacher is None else student_stages(config, teacher.stage + 1)
    timed = []
    for stage in stages:
        calls = 1
        if teacher is None:
            start = base_start(run)
        else:
            start = student_start(run, stage, teacher)
            if stage.grid == "adaptive":
                start = replace(start, grid=tuple(teachers_choice(run, stage, teacher).tolist()))
            grid = teacher_grid(teacher, stage.teacher_steps)
            calls = len(stage.method.paths(grid, start.levels()))  # the student and each leg
        timed.append(
            {
                "num_steps": stage.num_steps,
                "updates": stage.updates,
                "batch_size": stage.batch_size,
                "calls": calls,
                "seconds": seconds_per_update(run, stage, start, teacher, seconds),
            }
        )
        teacher = start if teacher is not None else None
    return timed


def seconds_per_update(
    run: "Run", stage: "Stage", start: "Checkpoint", teacher: "Checkpoint | None", limit: float
) -> float:
    """The CPU time of an update, over some that are not the first, for so long at most."""
    from pipeline.network import build_network, load_weights
    from training.loop import train_updates
    from training.stages import make_objective
    from training.trainee import make_trainee

    network = build_network(start.config, run.world.device, None if teacher is None else 0.0)
    load_weights(network, start.model, run.output)
    trainee = make_trainee(network, stage, run.world)
    objective = make_objective(run, stage, trainee, start, teacher)
    endless = replace(stage, updates=2**31)
    updates = train_updates(trainee, endless, run.dataset, objective, run.world)
    for _ in islice(updates, 2):
        pass
    begun = time.process_time()
    for count, _ in enumerate(updates, start=1):
        taken = time.process_time() - begun
        if count >= 3 and (taken > limit or count * stage.batch_size >= 2000):
            return taken / count
    raise AssertionError("endless")


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {
    "sampler": lambda r: r["sampler"],
    "steps": lambda r: str(r["steps"]),
    "parameters": lambda r: f"{r['parameters']:,}",
    "updates": lambda r: f"{r['updates']:,}",
    "images seen": lambda r: f"{r['images']:,}",
    "network calls": lambda r: f"{r['calls']:,}",
    "loss around update 1,000 -> at the end": lambda r: " -> ".join(
        f"{v:.4f}" for v in r["losses"]
    ),
    "Frechet distance": lambda r: f"{r['frechet']:.2f} ± {r['interval']:.2f}",
    "difference": lambda r: r.get("difference", ""),
    "distance to the teacher's samples": lambda r: _optional(r["to_teacher"], ".5f"),
    "loss on test images": lambda r: _optional(r["held_out"], ".6f"),
    "more than 90% sure": lambda r: _optional(r["confident"], ".3f"),
}
ONLY_IF_VARIED = ("sampler", "steps", "parameters")


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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


def difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The difference of two distances over the same noise, with its 95% interval.

    Jackknife over ten sets of noise (Efron 1982): se^2 = 9/10 sum_n (d_n - mean)^2, where d_n is
    the difference without set n.
    """
    pairs = zip(row["without"], other["without"], strict=True)
    without = [a - b for a, b in pairs]
    error = (JACKKNIFE - 1) / JACKKNIFE**0.5 * statistics.stdev(without)
    return f"{row['frechet'] - other['frechet']:+.2f} ± {STUDENT_T * error:.2f}"


def changes_of(sweep: Sweep, name: str) -> str:
    """What a variant changes, without the sections."""
    changes = sweep.variants[name.removesuffix(AGAIN)]
    seed = ["seed=1"] if name.endswith(AGAIN) else []
    keys_and_values = [change.partition("=") for change in [*changes, *seed]]
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in keys_and_values)


if __name__ == "__main__":
    sys.exit(main())
