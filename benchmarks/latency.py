"""How long an image takes: python -m benchmarks.latency > docs/latency.md.

By model, number of steps and batch size, in PyTorch, in ONNX Runtime and in a browser. Every cell
is the least of several times, in milliseconds an image; images a second are 1000 divided by it. A
batch that would take too long is left out.
"""

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import synchronise
from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.sampling import SampleRequest
from tools import export_onnx, onnx_file
from utils.command import (
    INTERRUPTED,
    OK,
    InputError,
    Stopped,
    add_device_argument,
    path_name,
    run_script,
    say,
    warn,
    whole_number,
)
from utils.processes import World, choose_device

Draw = Callable[[int], float | None]
"""Draws a batch of so many images; returns the seconds, if it takes the time itself."""

IN_THE_PAGE = ("teacher", "8-steps", "4-steps", "2-steps", "1-step")  # networks of these shapes
PUBLISHED = {
    Path(f"pretrained/mnist-{name}.safetensors"): name in IN_THE_PAGE
    for name in (*IN_THE_PAGE, "half-width-8-steps", "half-width-1-step")
}
BASE_STEPS = (1024, 64)  # of a base model
LONGEST = 16  # steps that are really done; more are a multiple of the time of these
REPEATS = 3
ENOUGH = 10.0  # seconds of repeats
TOO_LONG = 40.0  # seconds that a batch may take


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", nargs="+", type=path_name, default=[*PUBLISHED], metavar="FILE")
    sizes = [1, 4, 16, 64, 256]
    add("--batch_size", nargs="+", type=whole_number(1, 2**16), default=sizes, metavar="N")
    ways = ("pytorch", "onnx", "browser")
    add("--ways", nargs="+", choices=ways, default=ways, help="what they are run by")
    add_device_argument(parser)
    return run_script(parser, argv, measure)


def measure(arguments: argparse.Namespace) -> None:
    """Times every model in every way, and prints the table."""
    device, sizes = choose_device(arguments.device), arguments.batch_size
    rows = []
    timed: dict[tuple[Path, str, int], list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = open_browser(stack) if "browser" in arguments.ways else None
        for number, path in enumerate(arguments.checkpoint):
            checkpoint = load_checkpoint(path)
            if checkpoint.config.model.num_classes is not None:
                raise InputError(f"{path}: takes classes; models without are timed here")
            for steps in BASE_STEPS if checkpoint.num_steps is None else (checkpoint.num_steps,):
                ways: dict[str, tuple[Draw, int]] = {}
                if "pytorch" in arguments.ways:
                    ways["PyTorch"] = pytorch(checkpoint, path, steps, device)
                if "onnx" in arguments.ways and can_be_exported(checkpoint):
                    ways["ONNX Runtime"] = onnx(checkpoint, path, steps, folder / str(number))
                if browser is not None and PUBLISHED.get(path) and steps != BASE_STEPS[0]:
                    ways["browser"] = in_browser(browser, checkpoint, steps)
                for way, (draw, done) in ways.items():
                    if (path, way, done) not in timed:  # once for all of a base model's steps
                        timed[path, way, done] = per_image(draw, sizes, device)
                    took = [steps / done * one for one in timed[path, way, done]]
                    rows.append(row(path.stem, steps, way, took))
                    print(rows[-1], file=sys.stderr)
    say(table(rows, sizes, device))


def pytorch(
    checkpoint: Checkpoint, path: Path, steps: int, device: torch.device
) -> tuple[Draw, int]:
    """Returns a function that draws a batch with PyTorch, and its number of steps.

    At most LONGEST of a base model.
    """
    denoiser = load_denoiser(checkpoint, path, device)
    done = min(steps, LONGEST) if checkpoint.num_steps is None else steps
    request = SampleRequest.of(checkpoint, denoiser, World(device), steps=done)
    request = replace(request, shown=False)

    def draw(count: int) -> None:
        request.draw(range(count))

    return draw, done


def can_be_exported(checkpoint: Checkpoint) -> bool:
    """Returns whether tools/export_onnx.py writes all its steps as one graph."""
    config, steps = checkpoint.config, checkpoint.num_steps or 1
    ddim = (checkpoint.sampler or config.sampling.sampler) == "ddim" or checkpoint.num_steps == 1
    return config.codec.name == "pixels" and ddim and steps <= export_onnx.MOST_STEPS


def onnx(checkpoint: Checkpoint, path: Path, steps: int, folder: Path) -> tuple[Draw, int]:
    """Returns a function that draws a batch with one graph of all steps, and how many these are."""
    done = min(steps, export_onnx.MOST_STEPS)
    file = folder / f"{done}.onnx"
    command = [str(path), "--output", str(file)]
    command += [] if checkpoint.num_steps else ["--steps", str(done)]
    with redirect_stdout(sys.stderr):  # standard output is the table's
        code = OK if file.exists() else export_onnx.main(command)
    if code == INTERRUPTED:
        raise Stopped
    if code:
        raise InputError(f"{path}: not exported to ONNX")
    model = onnx_file.read_onnx(file, torch.get_num_threads())

    def draw(count: int) -> None:
        model(noise=torch.randn(count, *image_shape(checkpoint.config)))

    return draw, done


def open_browser(stack: ExitStack) -> Any:
    """Returns a browser with the page in docs/demo; None, with a warning, if there is none."""
    try:
        from tests.demo_site import CHROMIUM, DRIVER, Site, chromium

        if CHROMIUM is None or DRIVER is None:
            raise ImportError
        profile = stack.enter_context(tempfile.TemporaryDirectory())
        driver = stack.enter_context(chromium(profile))
    except ImportError:
        warn("no browser: it takes chromium, chromedriver and pip install selenium")
        return None
    driver.get(Site().page("latency"))
    driver.execute_async_script(
        "const d = arguments[0]; const w = setInterval(() => window.demo && "
        "(clearInterval(w), demo.loaded.then(() => d())), 50)"
    )
    return driver


def in_browser(browser: Any, checkpoint: Checkpoint, steps: int) -> tuple[Draw, int]:
    """Returns a function that draws a batch in the page in docs/demo, on one core."""
    from tests.demo_site import draw as draw_in

    name = "teacher" if checkpoint.num_steps is None else f"student-{steps}"

    def draw(count: int) -> float:
        return draw_in(browser, name, torch.randn(count, 1, 32, 32), steps)[1] / 1000

    return draw, steps


def per_image(draw: Draw, sizes: list[int], device: torch.device) -> list[float]:
    """Returns the seconds of an image by batch size, inf for batches that would take too long."""
    took: list[float] = []
    for size in sizes:
        expected = size * min(took, default=0.0)
        took.append(seconds(draw, size, device) / size if expected < TOO_LONG else math.inf)
    return took


def seconds(draw: Draw, size: int, device: torch.device) -> float:
    """The least time of REPEATS batches (fewer if ENOUGH seconds pass), after one not counted."""
    taken: list[float] = []
    while len(taken) < REPEATS + 1 and (len(taken) < 2 or sum(taken) < ENOUGH):
        begun = time.perf_counter()
        own = draw(size)
        synchronise(device)
        taken.append(time.perf_counter() - begun if own is None else own)
    return min(taken[1:])


def row(name: str, steps: int, way: str, took: list[float]) -> str:
    """Returns a row of the table: milliseconds an image by batch size."""
    cells = [f"{1000 * value:.1f}" if value < 1 else f"{1000 * value:,.0f}" for value in took]
    cells = ["" if cell == "inf" else cell for cell in cells]
    return f"| {name} | {steps} | {way} | {' | '.join(cells)} | {1 / min(took):,.1f} |"


def table(rows: list[str], sizes: list[int], device: torch.device) -> str:
    """Returns the table with what it was measured on."""
    threads = torch.get_num_threads()
    gpu = "" if device.type == "cpu" else " for PyTorch, cpu for the others"
    heads = [f"batch {size}" for size in sizes]
    return "\n".join(
        [
            "# Milliseconds an image",
            "",
            "`make latency` measured this while nothing else ran.",
            "",
            f"Milliseconds an image, {device}{gpu} ({processor()}), {threads} threads (the browser "
            f"has one), torch {torch.__version__}. A base model's {LONGEST} steps are timed, and "
            "multiplied for more.",
            "",
            f"| model | steps | run by | {' | '.join(heads)} | images a second at best |",
            f"|---|---:|---|{'---:|' * (len(sizes) + 1)}",
            *rows,
        ]
    )


def processor() -> str:
    """Returns the processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
