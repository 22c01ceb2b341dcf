"""What a GPU does with this project, in one command: python -m benchmarks.gpu (make gpu).

Tests on the device, images a second of training, distillation and sampling by precision, a run that
is stopped and continued, and a short training of the default network. Prints everything, and
writes it as Markdown and JSON. Parts that the time does not suffice for are named.
"""

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import distill
import train
from benchmarks.throughput import Bench, synchronise
from pipeline.checkpoint import load_checkpoint
from pipeline.config import Config, load_config
from training.metrics import read_metrics
from utils.command import (
    INTERRUPTED,
    InputError,
    Stopped,
    add_device_argument,
    path_name,
    run_script,
    say,
    warn,
    whole_number,
)
from utils.files import write_text
from utils.processes import choose_device

STEPS = 8  # of sampling
CONFIGS = ("mnist_small", "ddpm_32x32_v_continuous", "paper/cifar10")
# By precision, dense, in TFLOP/s, from NVIDIA's data sheets. The first whose words all occur.
PEAKS = {
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    "H100": {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0, "fp16": 989.0},
    "H200": {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0, "fp16": 989.0},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0},
    "L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "T4": {"fp32": 8.1, "fp16": 65.0},
}
# Values of a network small enough for a test on a CPU.
SMALL = [
    "model.channels=8",
    "model.channel_multipliers=[1,1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "model.patch_size=4",
    "model.attention_heads=1",
    "training.batch_size=2",
    "sampling.grid=1",
    "sampling.steps=2",
]


@dataclass(frozen=True)
class Way:
    """A way to run a network. channels_last: the order of its weights in memory.

    recorded: updates as CUDA graphs, on devices that have them.
    """

    precision: str
    compiled: bool = False
    channels_last: bool = True
    recorded: bool = False

    @property
    def name(self) -> str:
        """In words, for the table."""
        order = "" if self.channels_last else ", channels first"
        how = (", compiled" if self.compiled else "") + (", recorded" if self.recorded else "")
        return self.precision + how + order

    def config(self, config: Config) -> Config:
        """Returns the config with its engine set to this."""
        engine = {
            "precision": "fp32" if self.precision == "tf32" else self.precision,
            "tf32": self.precision == "tf32",
            "compile": self.compiled,
            "cuda_graphs": self.recorded,
        }
        return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


# The most telling first, the first of COMPILED fourth: the last ones may find no time left.
EAGER = (
    Way("tf32"),
    Way("tf32", recorded=True),
    Way("bf16"),
    Way("fp32"),
    Way("fp16"),
    Way("bf16", channels_last=False),
)
COMPILED = (Way("bf16", compiled=True), Way("tf32", compiled=True))


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add_device_argument(parser)
    add("--small", action="store_true", help="all of it with tiny networks, as a test")
    add("--minutes", type=whole_number(1, 1000), default=8, help="about how long (8)")
    add("--output", type=path_name, default=Path("output/gpu"), metavar="DIR")
    return run_script(parser, argv, measure)


def measure(arguments: argparse.Namespace) -> None:
    """Runs all parts, prints the report and writes it."""
    device, small, output = choose_device(arguments.device), arguments.small, arguments.output
    deadline = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "tests": device_tests(device, small),
        "resume": resume_test(device, output / "resume"),
        "tutorial": short_training(device, output / "tutorial", small),
        "speed": [],
        "left_out": [],
    }
    configs = {name: load_config(*config_of(name, small)) for name in CONFIGS}
    counted = {name: arithmetic(config, device) for name, config in configs.items()}
    ways = (*EAGER[:3], *COMPILED[:1], *EAGER[3:], *COMPILED[1:])
    work = [(name, way) for way in ways for name in CONFIGS]
    if small:  # each network once, and each way once, but for compilation, which takes long
        work = [(name, EAGER[0]) for name in CONFIGS]
        work += [(CONFIGS[0], way) for way in (*EAGER[1:], *COMPILED[:1])]
    for name, way in work:
        if time.monotonic() > deadline:
            result["left_out"].append(f"{name}, {way.name}")
            continue
        seconds = 0.0 if small else 2.0
        row = speed(name, configs[name], way, device, counted[name], seconds)
        say(table([row]).splitlines()[-1])
        result["speed"].append(row)
    write_text(output / "gpu.json", json.dumps(result, indent=2) + "\n")
    write_text(output / "gpu.md", report(result))
    say(report(result))
    say(f"written: {output / 'gpu.md'}, {output / 'gpu.json'}")
    if result["tests"]["failed"] or not result["resume"]["continued"]:
        raise InputError(f"{output / 'gpu.md'}: a test failed on {device}")


def config_of(name: str, small: bool) -> tuple[Path, list[str]]:
    """Returns a config's file, and what is set in it."""
    return Path(f"configs/{name}.yaml"), SMALL if small else []


def device_name(device: torch.device) -> str:
    """Returns the name that the maker gave the device, if torch knows it."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    name_of = getattr(getattr(torch, device.type), "get_device_name", str)
    return str(name_of(device))


def peaks_of(device: torch.device) -> dict[str, float]:
    """Returns the device's TFLOP/s by precision, as far as known."""
    words = set(re.split(r"[\s-]", device_name(device)))
    return next((peaks for name, peaks in PEAKS.items() if set(name.split()) <= words), {})


# --- correctness ----------------------------------------------------------------------------------


def device_tests(device: torch.device, small: bool) -> dict[str, Any]:
    """Runs tests/test_devices.py on the device. Returns how many passed and failed."""
    command = [sys.executable, "-m", "pytest", "tests/test_devices.py"]
    if small:
        command += ["-k", "of_the_cpu"]
    done = subprocess.run(
        command,
        env={**os.environ, "DEVICE": str(device)},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)
    }
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode and not failed:
        failed = 1
    if failed:
        warn((done.stdout + done.stderr)[-3000:])
    return {"passed": counts.get("passed", 0), "failed": failed}


def resume_test(device: torch.device, output: Path) -> dict[str, Any]:
    """Trains, and trains again from the middle; distils both, and compares the students.

    They have to agree far better than the weights have moved since the middle.
    """
    config, values = config_of("mnist_small", small=True)
    changes = ["training.updates=6", "training.checkpoint_every=3", "training.warmup=1"]
    ends = []
    for name in ("whole", "second-half"):
        folder = output / name
        command = ["--config_path", str(config), "--output", str(folder), "--device", str(device)]
        if name == "whole":
            command.append("--restart")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.copy(output / "whole" / "diffusion-3.pt", folder)
        require_done(train.main([*command, "--set", *values, *changes]))
        ladder = output / f"{name}-ladder"
        command = ["--teacher_model_checkpoint", str(folder / "diffusion-6.pt"), "--restart"]
        command += ["--output", str(ladder), "--device", str(device), "--set"]
        command += ["distillation.ladder=[4,2]", "distillation.updates_per_stage=3"]
        command += ["distillation.learning_rate=1.0e-4", "distillation.time_exponent=1.0"]
        require_done(distill.main(command))
        ends.append(load_checkpoint(ladder / "student-2.pt").weights)
    middle = load_checkpoint(output / "whole" / "diffusion-3.pt").weights
    largest, moved = (
        max((ends[0][name] - other[name]).abs().max().item() for name in ends[0])
        for other in (ends[1], middle)
    )
    return {"largest_difference": largest, "moved": moved, "continued": largest < moved / 10}


def short_training(device: torch.device, output: Path, small: bool) -> dict[str, Any]:
    """Trains the default network on MNIST for some updates, as its config says."""
    config, values = config_of("ddpm_32x32_v_continuous", small)
    updates = 3 if small else 300
    changes = [f"training.updates={updates}", "sampling.grid=16", "sampling.steps=32"]
    command = ["--config_path", str(config), "--output", str(output), "--device", str(device)]
    begun = time.monotonic()
    require_done(train.main([*command, "--restart", "--set", *values, *changes]))
    lines = read_metrics(output / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss")]
    speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    return {
        "updates": updates,
        "seconds": time.monotonic() - begun,
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-20:]),
        "images_per_second": statistics.median(speeds),
    }


def require_done(code: int) -> None:
    """Raises InputError if a script failed, which has said why, or Stopped if it was stopped."""
    if code == INTERRUPTED:
        raise Stopped
    if code:
        raise InputError(f"a run ended with exit code {code}")


# --- speed ----------------------------------------------------------------------------------------


def arithmetic(config: Config, device: torch.device) -> dict[str, float]:
    """Returns the GFLOP an image of each measure, counted where nothing is compiled."""
    return Bench(Way("fp32").config(config), device, STEPS).gflop


def speed(
    name: str,
    config: Config,
    way: Way,
    device: torch.device,
    gflop: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Returns images a second of training, distillation and sampling, and the share of the peak.

    gflop: see arithmetic; only convolutions and matrix products count (model FLOP utilisation).
    seconds: for how long each is repeated, at least three times.
    """
    peaks, batch = peaks_of(device), config.training.batch_size
    row: dict[str, Any] = {"config": name, "way": way.name, "batch_size": batch}
    if device.type != "cpu":
        gc.collect()  # a Bench holds itself, and its networks
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    try:
        bench = Bench(way.config(config), device, STEPS)
        if not way.channels_last:
            to_channels_first(bench)
        for title in ("training update", "distillation update", f"sampling, {STEPS} steps"):
            taken = median_seconds(bench, title, seconds)
            rate = bench.batch_size / taken
            kind = title.split()[0].strip(",")
            row[kind] = rate
            if way.precision in peaks:
                row[f"{kind}_utilisation"] = rate * gflop[title] / 1000 / peaks[way.precision]
    except RuntimeError as error:  # torch's, out of memory among them: the others may go well
        row["problem"] = str(error).splitlines()[0]
        warn(f"{name}, {way.name}: {error}")
    if device.type != "cpu":
        row["memory_mib"] = torch.accelerator.max_memory_allocated(device) / 2**20
    return row


def to_channels_first(bench: Bench) -> None:
    """Lays out the weights of all the networks of a Bench in torch's default order."""
    for network in bench.networks:
        network.to(memory_format=torch.contiguous_format)


def median_seconds(bench: Bench, title: str, limit: float) -> float:
    """Returns the median time of a measure, after two rounds of warming up."""
    work = bench.measures[title]
    for _ in range(2):
        work()
    synchronise(bench.device)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < limit and len(taken) < 200):
        begun = time.perf_counter()
        work()
        synchronise(bench.device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


# --- the report -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the speeds as Markdown: images a second, in brackets the share of the peak."""

    def cell(row: dict[str, Any], kind: str) -> str:
        if kind not in row:
            return str(row.get("problem", ""))
        share = row.get(f"{kind}_utilisation")
        return f"{row[kind]:,.0f}" + ("" if share is None else f" ({100 * share:.0f}%)")

    lines = [
        "| network | batch | engine | training | distillation | sampling, 8 steps | memory, MiB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [cell(row, kind) for kind in ("training", "distillation", "sampling")]
        memory = f"{row['memory_mib']:,.0f}" if "memory_mib" in row else ""
        about = (row["config"], str(row["batch_size"]), row["way"])
        lines.append(f"| {' | '.join([*about, *cells, memory])} |")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """Returns everything as Markdown."""
    tests, resume, tutorial = (result[key] for key in ("tests", "resume", "tutorial"))
    lines = [
        f"# {result['device']}",
        "",
        f"`python -m benchmarks.gpu` with torch {result['torch']}.",
        "",
        f"- tests/test_devices.py: {tests['passed']} passed, {tests['failed']} failed.",
        "- A run trained and distilled in one go, and one continued from the middle of the "
        f"training, end with weights that differ by at most {resume['largest_difference']:.1e}.",
        f"- The default network, {tutorial['updates']} updates in {tutorial['seconds']:.0f} s "
        f"including start-up, checkpoint and samples: loss {tutorial['first_loss']:.3f} -> "
        f"{tutorial['last_loss']:.3f}, {tutorial['images_per_second']:,.0f} images a second.",
        "",
        "Images a second; in brackets the share of the device's peak that the convolutions and "
        "matrix products alone account for (model FLOP utilisation):",
        "",
        table(result["speed"]),
        "",
    ]
    if result["left_out"]:
        lines += [f"Not measured, for lack of time: {'; '.join(result['left_out'])}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
