"""What a network costs, counted and not timed: python -m benchmarks.cost --config_path FILE.yaml ..

The network is built on torch's meta device, where tensors have shapes and no memory: the largest
network takes seconds and no hardware.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from utils.command import InputError, parse, run_command

DESCRIPTION = """\
Count parameters, arithmetic and memory of the networks of configs, for one image in float32,
without running them; with --gpus, also what their runs would cost on so many. Prints tables."""

HEADER = (
    "| config | parameters, M | forward, GFLOP | training update, GFLOP "
    "| distillation update, GFLOP | kept for the backward pass, MiB "
    "| weights, gradients, Adam, EMA, MiB | gradients, MiB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)
RUNS = (
    "| config | batch of a GPU | update, ms | base model, h | ladder, h | 50,000 samples, h "
    "| sent by a GPU in an update, MiB | all-reduce, ms | all-reduce / update |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and counts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--config_path", type=Path, nargs="+", required=True, metavar="FILE.yaml")
    parser.add_argument("--gpus", type=int, metavar="N", help="estimate the runs on N GPUs")
    parser.add_argument(
        "--tflops", type=float, default=989.0, help="of a GPU at its peak (H100, bf16, dense: 989)"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.3, help="share of the peak that is reached (0.3)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=100.0, help="GB/s of a GPU in an all-reduce (100)"
    )
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: print_costs(arguments))


def print_costs(arguments: argparse.Namespace) -> None:
    """A row of each table for each config."""
    from utils.config import load_config

    if arguments.gpus is not None and arguments.gpus < 1:
        raise InputError(f"--gpus {arguments.gpus}: take at least 1")
    if min(arguments.tflops, arguments.utilisation, arguments.bandwidth) <= 0:
        raise InputError("--tflops, --utilisation, --bandwidth: take numbers above 0")
    configs = {path.stem: load_config(path, []) for path in arguments.config_path}
    costs = {name: cost_of(config) for name, config in configs.items()}
    print(HEADER)
    for name, cost in costs.items():
        print(
            f"| {name} | {cost['parameters'] / 1e6:.1f} | {cost['forward']:.2f} | "
            f"{cost['training']:.2f} | {cost['distillation']:.2f} | {cost['activations']:.0f} | "
            f"{cost['state']:.0f} | {cost['gradients']:.0f} |"
        )

    if arguments.gpus is not None:
        print(f"\n{RUNS}")
        for name, config in configs.items():
            print(run_row(name, config, costs[name], arguments))


def run_row(name: str, config: Any, cost: dict[str, float], machine: argparse.Namespace) -> str:
    """What the base model's training and the ladder cost on the machine.

    Time: arithmetic over what the GPUs do in a second. A ring all-reduce moves 2 (n - 1) / n of
    the gradients' bytes in and out of each of n GPUs, in float32.
    """
    n, batch = machine.gpus, config.training.batch_size
    gflop_per_second = n * machine.tflops * 1e3 * machine.utilisation
    update = cost["training"] * batch / gflop_per_second
    ladder = sum(
        config.distillation.stage(k)[0]
        * config.distillation.batch_size
        * cost["distillation"]
        / gflop_per_second
        for k in range(config.distillation.iterations)
    )
    moved = 2 * (n - 1) / n * cost["gradients"]
    wire = moved * 2**20 / 1e9 / machine.bandwidth
    samples = 50_000 * config.sampling.steps * cost["forward"] / gflop_per_second
    base = config.training.updates * update
    hours = [f"{seconds / 3600:.2f}" for seconds in (base, ladder, samples)]
    return (
        f"| {name} | {batch // n} | {1e3 * update:.1f} | {' | '.join(hours)} | {moved:.0f} "
        f"| {1e3 * wire:.1f} | {wire / update:.0%} |"
    )


def cost_of(config: Any) -> dict[str, float]:
    """Counts of one image: GFLOP of convolutions and matrix products, MiB.

    A training update is a forward and a backward pass; one of distillation has two forward passes
    of the teacher before. state: float32 weights, gradients, both moments of Adam and the average.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    from utils.build import build_network, image_shape

    device = torch.device("meta")
    network = build_network(config, device, dropout=0.0)
    z = torch.empty(1, *image_shape(config), device=device)
    logsnr = torch.empty(1, device=device)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        network(z, logsnr)
    with FlopCounterMode(display=False) as training:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(z, logsnr)
        held = sum(kept.values()) - sum(
            kept.get(p.untyped_storage()._cdata, 0) for p in network.parameters()
        )
        output.sum().backward()
    parameters = sum(p.numel() for p in network.parameters())
    once, update = forward.get_total_flops() / 1e9, training.get_total_flops() / 1e9
    return {
        "parameters": parameters,
        "forward": once,
        "training": update,
        "distillation": update + 2 * once,
        "activations": held / 2**20,
        "state": 5 * 4 * parameters / 2**20,
        "gradients": 4 * parameters / 2**20,
    }


if __name__ == "__main__":
    sys.exit(main())
