"""What a network costs, counted and not timed: python -m benchmarks.cost --config_path FILE.yaml ..

The network is built on torch's meta device, where tensors have shapes and no memory: the largest
network takes seconds and no hardware.
"""

import argparse
import math
import sys
from typing import Any

from utils.command import InputError, path_name, run_script, whole_number

DESCRIPTION = """\
Count parameters, arithmetic and memory of the networks of configs, for one image in float32,
without running them; with --gpus, also what their runs would cost on so many (an adversarial loss
is not counted). Prints tables."""

HEADER = (
    "| config | parameters, M | forward, GFLOP | training update, GFLOP "
    "| distillation update, GFLOP | kept for the backward pass, MiB "
    "| weights, gradients, Adam, EMA, MiB | gradients, MiB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)
RUNS = (
    "| config | TFLOP/s of a GPU | batch of a GPU | arithmetic, ms | all-reduce, ms "
    "| sent by a GPU, MiB | update, ms | base model, h | ladder, h | 50,000 samples, h |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
H100 = {"tf32": 495.0, "fp32": 67.0, "bf16": 989.0, "fp16": 989.0}  # TFLOP/s, dense: NVIDIA's


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and counts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "--config_path", type=path_name, nargs="+", required=True, metavar="FILE.yaml"
    )
    parser.add_argument(
        "--gpus", type=whole_number(1, 2**20), metavar="N", help="estimate the runs on N GPUs"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="of a GPU at its peak; by default an H100's in the config's engine.precision",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.3, help="share of the peak that is reached (0.3)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=200.0, help="GB/s of a GPU in an all-reduce (200)"
    )
    return run_script(parser, argv, print_costs)


def print_costs(arguments: argparse.Namespace) -> None:
    """A row of each table for each config."""
    from pipeline.config import load_config
    from pipeline.latents import with_codec

    tflops = 1.0 if arguments.tflops is None else arguments.tflops
    if min(tflops, arguments.utilisation, arguments.bandwidth) <= 0:
        raise InputError("--tflops, --utilisation, --bandwidth: take numbers above 0")
    configs = [(path.stem, with_codec(load_config(path), path)) for path in arguments.config_path]
    costs = [cost_of(config) for _, config in configs]
    for name, config in configs:
        least = min(config.training.batch_size, config.distillation.batch_size)
        if arguments.gpus is not None and arguments.gpus > least:
            raise InputError(
                f"--gpus {arguments.gpus}: {name} has only {least} images in a batch; take fewer"
            )
    print(HEADER)
    for (name, _), cost in zip(configs, costs, strict=True):
        print(
            f"| {name} | {cost['parameters'] / 1e6:.1f} | {cost['forward']:.2f} | "
            f"{cost['training']:.2f} | {cost['distillation']:.2f} | {cost['activations']:.0f} | "
            f"{cost['state']:.0f} | {cost['gradients']:.0f} |"
        )

    if arguments.gpus is not None:
        print(f"\n{RUNS}")
        for (name, config), cost in zip(configs, costs, strict=True):
            print(run_row(name, config, cost, arguments))


def run_row(name: str, config: Any, cost: dict[str, float], machine: argparse.Namespace) -> str:
    """What the base model's training and the ladder cost on the machine.

    Time: arithmetic over what the GPUs do in a second. A ring all-reduce moves 2 (n - 1) / n of
    the gradients' bytes in and out of each of n GPUs, in float32, while the backward pass still
    computes: an update takes the longer of the two, after its forward passes.
    """
    from training.stage import student_stages

    n, engine = machine.gpus, config.engine
    precision = "tf32" if engine.precision == "fp32" and engine.tf32 else engine.precision
    tflops = machine.tflops or H100[precision]
    gflop_per_second = n * tflops * 1e3 * machine.utilisation
    moved = 2 * (n - 1) / n * cost["gradients"]
    wire = moved * 2**20 / 1e9 / machine.bandwidth
    backward = cost["training"] - cost["forward"]

    def seconds(forwards: int, batch: int) -> float:
        forward = forwards * cost["forward"] * batch / gflop_per_second
        return forward + max(backward * batch / gflop_per_second, wire)

    training = config.training
    update = seconds(1, training.batch_size)
    ladder = [s.updates * seconds(1 + calls_of(s), s.batch_size) for s in student_stages(config)]
    hours = [
        training.updates * update / 3600,
        sum(ladder) / 3600,
        50_000 * config.sampling.steps * cost["forward"] / gflop_per_second / 3600,
    ]
    arithmetic = cost["training"] * training.batch_size / gflop_per_second
    return (
        f"| {name} | {tflops:.0f} | {training.batch_size // n} | {1e3 * arithmetic:.1f} "
        f"| {1e3 * wire:.1f} | {moved:.0f} | {1e3 * update:.1f} "
        f"| {' | '.join(f'{h:.2f}' for h in hours)} |"
    )


def calls_of(stage: Any) -> int:
    """The calls of an image's target; at least so many if the grid is not uniform.

    One for each leg of its path, or two where a base model is guided.
    """
    guided = stage.guidance is not None and stage.number == 1
    if stage.method.needs_average:
        return 3 if guided else 2
    return (2 if guided else 1) * math.ceil(stage.teacher_steps / stage.num_steps)


def cost_of(config: Any) -> dict[str, float]:
    """Counts of one image: GFLOP of convolutions and matrix products, MiB.

    A training update is a forward and a backward pass; one of distillation has two forward passes
    of the teacher before, as in a stage that halves the steps. state: float32 weights, gradients,
    both moments of Adam and the average.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.build import image_shape
    from pipeline.network import build_network

    device = torch.device("meta")
    with device:  # no memory for the weights either, and no time to draw them
        network = build_network(config, device)
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
