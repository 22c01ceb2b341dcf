"""Several processes that run a script together, as torchrun starts them, but in less time.

torchrun's processes load torch and all the rest anew; these are forked from one that has.
"""

import importlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from training.metrics import read_metrics

PRELOADED = [
    "train",
    "distill",
    "sample",
    "evaluate",
    "tools.train_autoencoder",
    "evaluation.comparison",
    "evaluation.report",
    "training.autoencoder",
    "training.ladder",
    "training.stages",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "matplotlib.figure",
]


def run_together(count, module, *arguments, before=None):
    """Runs main(arguments) of a module in so many processes; returns what they said.

    before: a function without arguments, of a module, that each of them calls first. Raises
    AssertionError unless all end well.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    around = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(count)]
        processes = [
            context.Process(
                target=_run,
                args=(
                    {**around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    log,
                    module,
                    [str(argument) for argument in arguments],
                    before,
                ),
            )
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + 240
        try:
            for process in processes:
                process.start()
            while running := [process.sentinel for process in processes if process.is_alive()]:
                if any(process.exitcode for process in processes):  # others may wait for that one
                    deadline = min(deadline, time.monotonic() + 10)
                if time.monotonic() > deadline:
                    break
                wait(running, deadline - time.monotonic())
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [0] * count, said[-3000:]
    return said


def require_same_training(before, one, two):
    """Two trainings from the same weights led to the same ones, up to rounding.

    Adam divides by the gradient's size, so rounding shows where a gradient is almost nothing.
    """
    moved, apart = 0.0, 0.0
    for key, value in one.weights.items():
        if key in before.weights:  # and not an input of the student's own
            moved += (value - before.weights[key]).square().sum().item()
        apart += (value - two.weights[key]).square().sum().item()
    assert moved > 0
    assert apart**0.5 < 0.1 * moved**0.5


def require_same_metrics(one, two):
    """The losses and gradients in these folders are the same, up to rounding."""
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        if "loss" not in a:
            continue
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
        by_level = {key: a[key] for key in a if key.startswith("loss_logsnr_")}
        assert by_level == pytest.approx({key: b.get(key) for key in by_level}, rel=1e-3)


def fewer_real_images():
    """The features of all 80,000 take half a minute."""
    from evaluation import gallery

    real_images = gallery.real_images

    def few(config):
        real = real_images(config)
        return gallery.RealImages(real.reference[:1000], real.floor[:1000], real.training[:1000])

    gallery.real_images = few


def _run(around, log, module, arguments, before):
    os.environ.update(around)
    torch.set_num_threads(1)

    def work():
        if before is not None:
            before()
        return importlib.import_module(module).main(arguments)

    end_with(work, log)


def end_with(work, log):
    """Ends this process, a fork, with the exit code of work(); what it prints goes to log."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_alone(module, *commands, before=None):
    """Runs main() of a module with each of the commands, in one process of its own.

    For what goes badly with the run-time checks of shapes in the tests. before: a function without
    arguments, of a module, that the process calls first. Returns what it printed.
    """
    program = f"import json, sys; from {module} import main\n"
    if before is not None:
        program += f"from {before.__module__} import {before.__name__} as before; before()\n"
    program += "for arguments in json.loads(sys.argv[1]): assert main(arguments) == 0"
    command = [sys.executable, "-c", program, json.dumps(commands)]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def peak_memory():
    """The most memory that this process has had since its peak was reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def reset_peak_memory():
    """Lets peak_memory begin with what this process has now; getrusage would count all before."""
    Path("/proc/self/clear_refs").write_text("5")
