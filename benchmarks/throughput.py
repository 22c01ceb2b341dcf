"""What an update and a sample cost, beside the bare networks: python -m benchmarks.throughput.

All figures are taken in one run, every measure once a round and the rounds repeated, so that the
ratios are of neighbours in time. With --beside, updates and sampling are also timed with further
values of the config. Images are random numbers; no file is read but the config.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.command import (
    InputError,
    add_device_argument,
    path_name,
    run_script,
    whole_number,
)

DESCRIPTION = """\
Time a training update, a distillation update and sampling, against the bare networks, the network's
convolutions alone and a plain training loop. Prints a table and writes JSON."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--config_path", type=path_name, required=True, metavar="FILE.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--beside",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="time it with these too, e.g. engine.precision=bf16",
    )
    parser.add_argument(
        "--rounds", type=whole_number(1, 2**20), default=15, help="repeats of every measure (15)"
    )
    parser.add_argument(
        "--steps", type=whole_number(1, 2**20), default=8, help="sampling steps (8)"
    )
    parser.add_argument("--output", type=path_name, default=Path("output/throughput.json"))
    add_device_argument(parser)
    return run_script(parser, argv, measure)


def measure(arguments: argparse.Namespace) -> None:
    """Takes all measures, prints the table and writes the JSON file."""
    import torch

    from diffusion.losses import ADVERSARIAL
    from pipeline.config import load_config
    from pipeline.latents import with_codec
    from utils.files import write_text
    from utils.processes import choose_device

    for item in arguments.beside or ():
        if not item.startswith("engine.") or item.startswith("engine.tf32="):
            raise InputError(
                f"--beside {item}: take values of engine, and not tf32, which is global"
            )
    path = arguments.config_path
    config = with_codec(load_config(path, arguments.set), path)
    if ADVERSARIAL in config.distillation.loss_weights():
        raise InputError(f"distillation.losses: {ADVERSARIAL} is not timed; take the other terms")
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    bench = Bench(config, device, arguments.steps)
    bench.add_layers()
    measures = dict(bench.measures)
    if arguments.beside:
        changed = with_codec(load_config(path, [*arguments.set, *arguments.beside]), path)
        other = Bench(changed, device, arguments.steps)
        measures |= {
            beside(name, arguments): other.measures[name] for name in bench.whole_measures()
        }
    times: dict[str, list[float]] = {name: [] for name in measures}
    for round_number in range(arguments.rounds + 2):
        for name, work in measures.items():
            start = time.perf_counter()
            work()
            synchronise(device)
            if round_number >= 2:  # two rounds to warm up
                times[name].append(time.perf_counter() - start)
    result = summarise(times, bench, arguments)
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"\nwritten: {arguments.output}")


def beside(name: str, arguments: argparse.Namespace) -> str:
    """The name of a measure that is taken with the further values."""
    return f"{name}, {' '.join(arguments.beside)}"


def synchronise(device) -> None:  # type: ignore[no-untyped-def]
    """Waits until the device has done all that it was asked for."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Bench:
    """The things to be timed, each a function without arguments, by name.

    gflop: the arithmetic of an image in each, by the same names. fastest: GFLOP/s of the fastest
    convolution and the fastest matrix product at the network's own shapes.
    """

    def __init__(self, config, device, steps: int) -> None:  # type: ignore[no-untyped-def]
        import torch

        from pipeline.build import image_shape
        from pipeline.network import build_schedule

        self.config, self.device, self.steps = config, device, steps
        self.batch_size = config.training.batch_size
        self.networks: list[Any] = []
        self.schedule = build_schedule(config)
        shape = image_shape(config)
        self.pixels = torch.randint(
            0, 256, (4 * self.batch_size, *shape), dtype=torch.uint8, device=device
        )
        self.z = torch.randn(self.batch_size, *shape, device=device)
        self.logsnr = torch.linspace(-20, 20, self.batch_size, device=device)
        self.teacher = self.network().requires_grad_(False).eval()
        self.teaching = self.denoiser(self.teacher)
        self.parameters = sum(p.numel() for p in self.teacher.parameters())
        self.measures: dict[str, Callable[[], object]] = {
            **self.updates_measured(),
            "plain training loop": plain_update(self.network(), self.pixels, self.schedule),
            **self.sampling_measured(),
        }
        self.fastest: dict[str, float] = {}

    @cached_property
    def gflop(self) -> dict[str, float]:
        """See the class; counted on first use."""
        bare = f"bare forwards, {self.steps}"
        counted = {
            name: self.gflop_of(self.measures[name])
            for name in ("bare training", "bare distillation", bare)
        }
        return counted | {
            "forward": self.gflop_of(lambda: self._bare_forwards(1)),
            "training update": counted["bare training"],
            "distillation update": counted["bare distillation"],
            "plain training loop": counted["bare training"],
            f"sampling, {self.steps} steps": counted[bare],
        }

    def whole_measures(self) -> tuple[str, ...]:
        """The names of what users wait for."""
        return "training update", "distillation update", f"sampling, {self.steps} steps"

    def add_layers(self) -> None:
        """Adds the network's layers alone to the measures, and finds the fastest."""
        import torch

        for name, kind in (
            ("convolutions alone", torch.nn.Conv2d),
            ("matrix products alone", torch.nn.Linear),
        ):
            self._add_layers(name, kind)

    def network(self):  # type: ignore[no-untyped-def]
        """A network of the config, no part of which is zero: that would be cheap."""
        import torch

        from pipeline.network import build_network

        made = build_network(self.config, self.device, dropout=0.0)
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.networks.append(made)
        return made

    def denoiser(self, network):  # type: ignore[no-untyped-def]
        """The network as the engine calls it."""
        from pipeline.build import build_denoiser

        return build_denoiser(self.config, network, self.device)

    def updates_measured(self) -> dict[str, Callable[[], object]]:
        """The engine's updates, and the networks alone: forward, backward, Adam; two forwards."""
        from diffusion.losses import SQUARED_ERRORS, weighted_sum
        from diffusion.objectives import denoising_objective, distillation_objective
        from training.trainee import make_optimizer

        config, schedule = self.config, self.schedule
        base_loss = SQUARED_ERRORS[config.diffusion.loss_weight]
        student_loss = weighted_sum(config.distillation.loss_weights())
        legs, paths = [self.teaching] * 2, self.paths()
        train = self._endless_updates(
            lambda denoiser: denoising_objective(denoiser, schedule, base_loss), ema_decay=0.9999
        )
        distil = self._endless_updates(
            lambda denoiser: distillation_objective(denoiser, legs, paths, student_loss)
        )
        bare = self.network().train()
        called, optimizer = self.denoiser(bare).network, make_optimizer(bare)

        def bare_update() -> None:
            called(self.z, self.logsnr).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        def bare_distillation() -> None:
            self._bare_forwards(2)
            bare_update()

        return {
            "training update": lambda: next(train),
            "bare training": bare_update,
            "distillation update": lambda: next(distil),
            "bare distillation": bare_distillation,
        }

    def paths(self):  # type: ignore[no-untyped-def]
        """The levels of a stage from 8 to 4 steps, which has two legs in each transition."""
        from diffusion.grids import uniform_grid
        from diffusion.paths import neighbours

        grids = [uniform_grid(self.schedule, steps) for steps in (8, 4)]
        return neighbours(*grids).to(self.device)

    def sampling_measured(self) -> dict[str, Callable[[], object]]:
        """DDIM, and as many forward passes."""
        from diffusion.grids import uniform_grid
        from diffusion.samplers import ddim

        levels = uniform_grid(self.schedule, self.steps).to(self.device)
        return {
            f"sampling, {self.steps} steps": lambda: ddim(self.teaching, self.z, levels),
            f"bare forwards, {self.steps}": lambda: self._bare_forwards(self.steps),
        }

    def _bare_forwards(self, count: int) -> None:
        import torch

        with torch.no_grad():
            for _ in range(count):
                self.teaching.network(self.z, self.logsnr)

    def gflop_of(self, work: Callable[[], object]) -> float:
        """GFLOP an image of the convolutions and matrix products, by torch's own counter."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e9 / self.batch_size

    def _add_layers(self, name: str, kind: type) -> None:
        """Adds the network's layers of a kind, run one after another at their own shapes."""
        runs, rates = [], []
        for module, shape in layer_shapes(self.network(), kind, self.z, self.logsnr):
            seconds, run = best_layout(module, shape, self.device)
            runs.append(run)
            rates.append(self.gflop_of(run) * self.batch_size / seconds)

        def all_of_them() -> None:
            for run in runs:
                run()

        self.measures[name] = all_of_them
        self.gflop[name] = self.gflop_of(all_of_them)
        self.fastest[name.removesuffix("s alone")] = max(rates)

    def _endless_updates(self, objective_of, ema_decay=None):  # type: ignore[no-untyped-def]
        """The loop's updates, without end."""
        import torch

        from pipeline.data import MemoryDataset
        from training.loop import train_updates
        from training.stage import Stage
        from training.trainee import make_trainee
        from utils.processes import World

        stage = Stage(
            number=0,
            seed=0,
            updates=2**31,
            batch_size=self.batch_size,
            accumulate=1,
            gradient_clip=1.0,
            checkpoint_every=2**31,
            learning_rate=1e-5,
            decays=False,
            ema_decay=ema_decay,
        )
        network, world = self.network(), World(self.device)
        labels = torch.zeros(len(self.pixels), device=self.device)
        return train_updates(
            make_trainee(network, stage, world, self.config.engine),
            stage,
            MemoryDataset(self.pixels, labels, None),
            objective_of(self.denoiser(network)),
            world,
        )


def plain_update(network, pixels, schedule) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """An update as one would first write it: default layout, EMA by parameter, two .item()s."""
    import torch

    network = network.to(memory_format=torch.contiguous_format).train()
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    batch = len(pixels) // 4

    def update() -> None:
        x = pixels[torch.randint(len(pixels), (batch,))].float() / 127.5 - 1
        eps = torch.randn_like(x)
        logsnr = schedule(torch.rand(batch, dtype=torch.float64)).float().to(x.device)
        alpha = torch.sigmoid(logsnr).sqrt()[:, None, None, None]
        sigma = torch.sigmoid(-logsnr).sqrt()[:, None, None, None]
        output = network(alpha * x + sigma * eps, logsnr)
        loss = (output[:, : x.shape[1]] - (alpha * eps - sigma * x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=False)
        optimizer.step()
        loss.item(), norm.item()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                average[name] = 0.9999 * average[name] + 0.0001 * parameter

    return update


# --- the network's own layers ---------------------------------------------------------------------


def layer_shapes(network, kind, z, logsnr):  # type: ignore[no-untyped-def]
    """Every layer of a kind that a forward pass meets: (module, the shape of its input)."""
    import torch

    shapes = []

    def note(module, inputs, output) -> None:  # type: ignore[no-untyped-def]
        shapes.append((module, inputs[0].shape))

    handles = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, kind)]
    with torch.no_grad():
        network(z, logsnr)
    for handle in handles:
        handle.remove()
    return shapes


def best_layout(module, shape, device):  # type: ignore[no-untyped-def]
    """Forward and backward of one layer alone, in the faster memory format: (seconds, function)."""
    import torch

    def made(memory_format):  # type: ignore[no-untyped-def]
        layer = copy.deepcopy(module).to(memory_format=memory_format)
        x = torch.randn(shape, device=device)
        x = (x.to(memory_format=memory_format) if x.ndim == 4 else x).requires_grad_()
        gradient = torch.randn_like(layer(x))

        def run() -> None:
            layer(x).backward(gradient)

        return run

    def seconds(run: Callable[[], None]) -> float:
        run()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    formats = (torch.contiguous_format, torch.channels_last)
    timed = [(seconds(run), run) for run in map(made, formats)]
    return min(timed, key=lambda pair: pair[0])


# --- the report -----------------------------------------------------------------------------------

RATIOS = {
    "training update / bare training": ("training update", "bare training"),
    "distillation update / bare distillation": ("distillation update", "bare distillation"),
    "sampling / bare forwards": ("sampling, {}", "bare forwards, {}"),
    "training update / convolutions alone": ("training update", "convolutions alone"),
    "training update / plain training loop": ("training update", "plain training loop"),
}

IN_FLOAT32 = ("convolutions alone", "plain training loop")


def summarise(times: dict[str, list[float]], bench: Bench, arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Medians, quartiles, rates and paired ratios, as plain values."""
    import torch

    def spread(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {
            "median": statistics.median(ordered),
            "lower_quartile": ordered[len(ordered) // 4],
            "upper_quartile": ordered[(3 * len(ordered)) // 4],
        }

    plain = {beside(name, arguments): name for name in bench.whole_measures()}
    measures = {}
    for name, values in times.items():
        measures[name] = {"seconds": spread(values)}
        measures[name]["images_per_second"] = bench.batch_size / statistics.median(values)
        gflop = bench.gflop[plain.get(name, name)]
        rate = gflop * bench.batch_size / statistics.median(values)
        measures[name]["gflop_per_second"] = rate
    ratios = {}
    steps = (f"{bench.steps} steps", str(bench.steps))
    for title, (top, bottom) in RATIOS.items():
        if bottom in IN_FLOAT32 and bench.config.engine.precision != "fp32":
            continue
        pair = (times[top.format(steps[0])], times[bottom.format(steps[1])])
        ratios[title] = spread([a / b for a, b in zip(*pair, strict=True)])
    for name in filter(times.__contains__, plain):
        pair = times[name], times[plain[name]]
        ratios[f"{name} / without"] = spread([a / b for a, b in zip(*pair, strict=True)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if bench.device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(bench.device) / 2**20
    return {
        "config": str(arguments.config_path),
        "set": arguments.set,
        "device": str(bench.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": bench.batch_size,
        "parameters": bench.parameters,
        "gflop_per_image": bench.gflop,
        "fastest_gflop_per_second": bench.fastest,
        "peak_memory_mib": peak,
        "rounds": arguments.rounds,
        "measures": measures,
        "ratios": ratios,
    }


def table(result) -> str:  # type: ignore[no-untyped-def]
    """The result as Markdown."""
    lines = [
        f"{result['config']} {' '.join(result['set'])}: {result['parameters']:,} parameters, "
        f"batch {result['batch_size']}, {result['device']} ({result['threads']} threads), "
        f"torch {result['torch']}, {result['rounds']} rounds",
        "",
        "| measure | ms, median (quartiles) | images/s | GFLOP/s |",
        "|---|---:|---:|---:|",
    ]
    for name, measure in result["measures"].items():
        s = {key: 1000 * value for key, value in measure["seconds"].items()}
        lines.append(
            f"| {name} | {s['median']:.1f} ({s['lower_quartile']:.1f} .. {s['upper_quartile']:.1f})"
            f" | {measure['images_per_second']:.0f} | {measure['gflop_per_second']:.0f} |"
        )
    lines += ["", "| ratio, paired by round | median (quartiles) |", "|---|---:|"]
    for name, ratio in result["ratios"].items():
        low, high = ratio["lower_quartile"], ratio["upper_quartile"]
        lines.append(f"| {name} | {ratio['median']:.3f} ({low:.3f} .. {high:.3f}) |")
    gflop = result["gflop_per_image"]
    shown = ("forward", "training update", "distillation update")
    fastest = ", ".join(
        f"{k} {v:.0f} GFLOP/s" for k, v in result["fastest_gflop_per_second"].items()
    )
    lines += [
        "",
        f"GFLOP an image: {', '.join(f'{name} {gflop[name]:.3f}' for name in shown)}.",
        f"The fastest layers, forward and backward: {fastest}.",
        f"Peak memory {result['peak_memory_mib']:.0f} MiB.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
