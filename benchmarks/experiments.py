"""Which recipe makes the best teacher in equal CPU time: python -m benchmarks.experiments.

Every variant of a small network (COMMON) is trained by train.py for as many updates as fit into the
same CPU time of one thread (timed on a few updates of its own), its learning rate falling to 0,
and its samples are measured. Run the same command again to go on; --only runs some of them, so
that several can run side by side.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
    from evaluation.gallery import Gallery
    from pipeline.checkpoint import Checkpoint
    from pipeline.config import Config

BASE = Path("configs/mnist_small.yaml")
COMMON = [
    "model.channels=32",
    "model.blocks_per_level=1",
    "training.batch_size=64",
    "training.learning_rate=0.001",
    "training.learning_rate_decay=linear",
    "training.warmup=200",
]
SMALL_BATCH = "training.batch_size=32"
DEEP = [SMALL_BATCH, "model.channels=24", "model.blocks_per_level=2"]
VARIANTS = {
    "base32": [SMALL_BATCH],
    "b16": ["training.batch_size=16"],
    "b64": ["training.batch_size=64"],
    "c48": [SMALL_BATCH, "model.channels=48"],
    "c24b2": DEEP,
    "c32b2": [SMALL_BATCH, "model.blocks_per_level=2"],
    "c24b3": [SMALL_BATCH, "model.channels=24", "model.blocks_per_level=3"],
    "c24b2_rate2": [*DEEP, "training.learning_rate=0.002"],
    "c24b2_attend4": [*DEEP, "model.attention_resolutions=[4]"],
    "c24b2_b16_rate2": [*DEEP[1:], "training.batch_size=16", "training.learning_rate=0.002"],
    "c32_124": [SMALL_BATCH, "model.channel_multipliers=[1,2,4]"],
    "c16p1": [
        SMALL_BATCH,
        "model.patch_size=1",
        "model.channels=16",
        "model.channel_multipliers=[1,2,4,4]",
    ],
    "uniform": [SMALL_BATCH, "training.times=uniform"],
    "trunc": [SMALL_BATCH, "diffusion.loss_weight=snr_trunc"],
    "rate2": [SMALL_BATCH, "training.learning_rate=0.002"],
    "ema999": [SMALL_BATCH, "training.ema_decay=0.999"],
}


class Diverged(InputError):
    """The training ended by itself, as it learnt nothing any more."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains and measures. Returns the exit code."""
    parser = make_parser(__doc__, seconds=600, steps=32, output="output/experiments")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: experiment(arguments), GO_ON)


def make_parser(
    about: str | None, seconds: int, steps: int | None, output: str
) -> argparse.ArgumentParser:
    """The options of a comparison in equal CPU time, with its defaults.

    steps: of the samplers; None where each checkpoint has its own.
    """
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add(
        "--seconds",
        type=whole_number(1, 2**20),
        default=seconds,
        help=f"of CPU time for each ({seconds})",
    )
    add("--count", type=whole_number(1, 10**7), default=1000, help="samples of each (1000)")
    if steps is not None:
        add(
            "--steps", type=whole_number(1, 2**20), default=steps, help=f"of the samplers ({steps})"
        )
    add("--output", type=path_name, default=Path(output))
    add("--table", action="store_true", help="only print what is known so far")
    return parser


def experiment(arguments: argparse.Namespace) -> None:
    """Trains and measures each variant, and prints the table."""
    import torch

    torch.set_num_threads(1)
    if not arguments.table:
        for name in arguments.only:
            run_variant(name, arguments)
    say(table(arguments))


def run_variant(name: str, arguments: argparse.Namespace) -> None:
    """Trains a variant to its end and writes result.json beside it."""
    folder = arguments.output / name
    known = folder / "result.json"
    if known.exists() and not json.loads(known.read_text())["rows"]:
        return  # diverged
    try:
        trained = train_for(arguments.seconds, folder, BASE, [*COMMON, *VARIANTS[name]])
    except Diverged:
        write_text(known, json.dumps({"rows": {}}) + "\n")
        return
    measure(trained, folder, ["ddim"], arguments.steps, arguments.count)


def train_for(seconds: int, folder: Path, base: Path, overrides: list[str]) -> Path:
    """Trains a config for so much CPU time of one thread; returns the last checkpoint.

    Raises Diverged.
    """
    import train
    from pipeline.config import load_config
    from training.metrics import read_metrics

    updates = planned_updates(seconds, folder, lambda: cpu_seconds(load_config(base, overrides)))
    last = folder / f"diffusion-{updates}.pt"
    if not last.exists():
        more = [f"training.updates={updates}", "training.checkpoint_every=1000000"]
        command = ["--config_path", str(base), "--output", str(folder), "--device", "cpu"]
        command += ["--set", *overrides, *more]
        code = train.main(command)
        if code == INTERRUPTED:
            raise Stopped
        if code != OK:
            lines = read_metrics(folder / "metrics.jsonl") if folder.exists() else []
            if lines and lines[-1].get("skipped"):
                raise Diverged(f"{folder}: no finite gradient any more")
            raise InputError(f"{folder}: training ended before its time")
    return last


def planned_updates(
    seconds: int, folder: Path, per_update: Callable[[], float], start: str = ""
) -> int:
    """How many updates fit into the time; timed once, and kept in plan.json.

    start: what training begins with. Raises InputError where the plan is of another time or start.
    """
    path = folder / "plan.json"
    if not path.exists():
        one = per_update()
        updates = max(1, int(seconds / one))
        plan = {"seconds": seconds, "per_update": one, "updates": updates, "start": start}
        write_text(path, json.dumps(plan) + "\n")
    plan = json.loads(path.read_text())
    if plan.get("seconds", seconds) != seconds:
        raise InputError(f"{path}: planned for {plan['seconds']} s; give another --output")
    if plan.get("start", "") != start:
        raise InputError(f"{path}: planned for another checkpoint; give another --output")
    return int(plan["updates"])


def samples_in(folder: Path) -> "Gallery":
    """The samples of one variant, drawn on the CPU; all variants start from the same noise."""
    import torch

    from evaluation.gallery import Gallery
    from utils.processes import World

    return Gallery(folder / "images", World(torch.device("cpu")), seed=0, batch_size=125)


def measure(path: Path, folder: Path, samplers: list[str], steps: int | None, count: int) -> None:
    """Draws and measures samples of a checkpoint; writes result.json, a row for each sampler.

    steps: of a base model; a student has its own.
    """
    import torch

    from evaluation.comparison import Comparison
    from evaluation.features import make_extractor
    from evaluation.gallery import real_images
    from pipeline.checkpoint import load_checkpoint

    known = folder / "result.json"
    if known.exists():
        before = json.loads(known.read_text())
        if (before["count"], before["steps"]) != (count, steps):
            raise InputError(
                f"{known}: of {before['count']} samples of {before['steps']} steps; ask for the "
                "same (--count, --steps), or delete it to measure anew"
            )
        return
    checkpoint = load_checkpoint(path)
    recipe = checkpoint.config.training if steps else checkpoint.config.distillation
    extract = make_extractor("digits", torch.device("cpu"))
    comparison = Comparison(extract, real_images(checkpoint.config), with_training=False)
    rows = {}
    for sampler in samplers:
        images = samples_in(folder).images(
            checkpoint, path, sampler, steps or checkpoint.num_steps or 1, count
        )
        quality = comparison.foreign(sampler, images).quality
        rows[sampler] = {
            "frechet": quality.frechet,
            "interval": quality.frechet_interval,
            "confident": quality.confident,
        }
    result = {
        "parameters": sum(tensor.numel() for tensor in checkpoint.model.values()),
        "batch_size": recipe.batch_size,
        "updates": checkpoint.update,
        "count": count,
        "steps": steps,
        "rows": rows,
    }
    write_text(known, json.dumps(result) + "\n")


def cpu_seconds(config: "Config", teacher: "Checkpoint | None" = None) -> float:
    """The CPU time of an update, over some that are not the first. teacher: of distillation's."""
    import torch

    from pipeline.build import build_dataset, build_denoiser, build_schedule, load_denoiser
    from pipeline.network import build_network
    from training.loop import (
        Plan,
        Trainee,
        base_objective,
        make_optimizer,
        student_objective,
        updates,
    )
    from utils.processes import World

    device = torch.device("cpu")
    network = build_network(config, device)
    average = copy.deepcopy(network).requires_grad_(False) if teacher is None else None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainee = Trainee(network, network, average, make_optimizer(network), scaler)
    batch_size = (config.training if teacher is None else config.distillation).batch_size
    plan = Plan(
        seed=0,
        stage=0,
        updates=2**31,
        batch_size=batch_size,
        learning_rate=lambda update: 1e-5,
        gradient_clip=1.0,
        checkpoint_every=2**31,
        ema_decay=0.999,
    )
    denoiser, schedule = build_denoiser(config, network, device), build_schedule(config)
    if teacher is None:
        objective = base_objective(denoiser, schedule, "snr_plus_one")
    else:
        taught_by = load_denoiser(teacher, Path("the teacher"), device)
        objective = student_objective(denoiser, taught_by, schedule, 8, "snr_trunc")
    steps = updates(trainee, plan, build_dataset(config, device), objective, World(device))
    count = max(20, 2000 // batch_size)
    for _ in itertools.islice(steps, 5):
        pass
    begun = time.process_time()
    for _ in itertools.islice(steps, count):
        pass
    return (time.process_time() - begun) / count


def table(arguments: argparse.Namespace) -> str:
    """What is known, the best first, as Markdown."""
    results = {
        name: json.loads(path.read_text())
        for name in VARIANTS
        if (path := arguments.output / name / "result.json").exists()
    }
    lines = [
        "| variant | changes | parameters | updates | images seen | loss around update 1,000 "
        "| loss at the end | Frechet distance | more than 90% sure |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    trained = {name: r for name, r in results.items() if r["rows"]}
    for name, r in sorted(trained.items(), key=lambda item: item[1]["rows"]["ddim"]["frechet"]):
        row = r["rows"]["ddim"]
        losses = ["another", "another"]  # a loss of another weight is no measure of this one
        if "loss_weight" not in changes_of(name):
            losses = losses_of(arguments.output / name)
        lines.append(
            f"| {name} | {changes_of(name)} | {r['parameters']:,} | {r['updates']:,} "
            f"| {r['updates'] * r['batch_size']:,} "
            f"| {' | '.join(losses)} "
            f"| {row['frechet']:.2f} ± {row['interval']:.2f} | {row['confident']:.3f} |"
        )
    lines += [
        f"| {name} | {changes_of(name)} | | | | | | diverged | |"
        for name in results
        if name not in trained
    ]
    return "\n".join(lines)


def changes_of(name: str) -> str:
    """What a variant changes, without the sections."""
    return ", ".join(change.partition(".")[2] for change in VARIANTS[name])


def losses_of(folder: Path) -> list[str]:
    """The mean loss of the updates 850 to 1,150, and of the last tenth of all."""
    from training.metrics import read_metrics

    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    parts = losses[850:1150], losses[-max(1, len(losses) // 10) :]
    return [f"{statistics.mean(part):.4f}" if part else "" for part in parts]


if __name__ == "__main__":
    sys.exit(main())
