"""What an update and a sample cost, beside the bare networks: python -m benchmarks.throughput.

All figures are taken in one run, every measure once a round and the rounds repeated, so that the
ratios are of neighbours in time. Images are random numbers; no file is read but the config.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.command import InputError, add_device_argument, parse, run_command

DESCRIPTION = """\
Time a training update, a distillation update and sampling, against the bare networks, the network's
convolutions alone and a plain training loop. Prints a table and writes JSON."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--config_path", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=15, help="repeats of every measure (15)")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps (8)")
    parser.add_argument("--output", type=Path, default=Path("output/throughput.json"))
    add_device_argument(parser)
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> None:
    """Takes all measures, prints the table and writes the JSON file."""
    import torch

    from utils.config import load_config
    from utils.distributed import choose_device
    from utils.files import write_text

    if arguments.rounds < 1 or arguments.steps < 1:
        raise InputError("--rounds, --steps: take at least 1")
    config = load_config(arguments.config_path, arguments.set)
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    bench = Bench(config, device, arguments.steps)
    times: dict[str, list[float]] = {name: [] for name in bench.measures}
    for round_number in range(arguments.rounds + 2):
        for name, work in bench.measures.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number >= 2:  # two rounds to warm up
                times[name].append(time.perf_counter() - start)
    result = summarise(times, bench, arguments)
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"\nwritten: {arguments.output}")


class Bench:
    """The things to be timed, each a function without arguments, by name."""

    def __init__(self, config, device, steps: int) -> None:  # type: ignore[no-untyped-def]
        import torch

        from diffusion.samplers import ddim
        from diffusion.schedule import sampling_levels
        from utils.build import build_denoiser, build_network, build_schedule, image_shape
        from utils.data import MemoryDataset
        from utils.distributed import World
        from utils.training import Trainee, base_objective, make_optimizer, student_objective

        self.config, self.device, self.steps = config, device, steps
        self.batch_size = config.training.batch_size
        shape = image_shape(config)
        schedule = build_schedule(config)
        pixels = torch.randint(0, 256, (4 * self.batch_size, *shape), dtype=torch.uint8)
        dataset = MemoryDataset(pixels.to(device), torch.zeros(len(pixels), device=device), None)
        world = World(device)
        z = torch.randn(self.batch_size, *shape, device=device)
        logsnr = torch.linspace(-20, 20, self.batch_size, device=device)
        scaler = torch.amp.GradScaler(device.type, enabled=config.engine.precision == "fp16")

        def network():  # type: ignore[no-untyped-def]
            made = build_network(config, device, dropout=0.0)
            for parameter in made.parameters():
                if not parameter.any():  # what begins at zero would be cheap
                    torch.nn.init.normal_(parameter, std=0.02)
            return made

        def updates_of(objective_of, ema: bool):  # type: ignore[no-untyped-def]
            trained = network()
            average = copy.deepcopy(trained).requires_grad_(False) if ema else None
            trainee = Trainee(trained, trained, average, make_optimizer(trained), scaler)
            objective = objective_of(build_denoiser(config, trained, device))
            return self._endless_updates(trainee, dataset, objective, world, ema)

        teacher = network().requires_grad_(False).eval()
        teaching = build_denoiser(config, teacher, device)
        weight = config.diffusion.loss_weight
        train = updates_of(lambda d: base_objective(d, schedule, weight), ema=True)
        distil = updates_of(
            lambda d: student_objective(d, teaching, schedule, 4, config.distillation.loss_weight),
            ema=False,
        )

        bare = network().train()
        called = build_denoiser(config, bare, device).network
        optimizer = make_optimizer(bare)

        def bare_update() -> None:
            called(z, logsnr).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        @torch.no_grad()
        def bare_forward(count: int) -> None:
            for _ in range(count):
                teaching.network(z, logsnr)

        def bare_distillation() -> None:
            bare_forward(2)
            bare_update()

        levels = sampling_levels(schedule, steps).to(device)
        self.shapes = convolution_shapes(bare, z, logsnr)
        self.gflop = {
            "forward": gflop_of(lambda: bare_forward(1)) / self.batch_size,
            "training update": gflop_of(bare_update) / self.batch_size,
            "distillation update": gflop_of(bare_distillation) / self.batch_size,
        }
        self.parameters = sum(p.numel() for p in bare.parameters())
        self.convolutions = {
            name: best_layout(module, shape, device)
            for name, (module, shape) in self.shapes.items()
        }
        self.measures: dict[str, Callable[[], object]] = {
            "training update": lambda: next(train),
            "bare training": bare_update,
            "plain training loop": plain_update(network(), pixels.to(device), schedule),
            "distillation update": lambda: next(distil),
            "bare distillation": bare_distillation,
            f"sampling, {steps} steps": lambda: ddim(teaching, z, levels),
            f"bare forwards, {steps}": lambda: bare_forward(steps),
            "convolutions alone": self._convolutions_once,
        }

    def _endless_updates(self, trainee, dataset, objective, world, ema):  # type: ignore[no-untyped-def]
        from utils.training import Plan, updates

        plan = Plan(
            seed=0,
            stage=0,
            updates=2**31,
            batch_size=self.batch_size,
            learning_rate=lambda update: 1e-5,
            gradient_clip=1.0,
            checkpoint_every=2**31,
            ema_decay=0.9999 if ema else None,
        )
        return updates(trainee, plan, dataset, objective, world)

    def _convolutions_once(self) -> None:
        for run in self.convolutions.values():
            run()


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


# --- the network's own arithmetic -----------------------------------------------------------------


def gflop_of(work: Callable[[], object]) -> float:
    """The arithmetic of the work's convolutions and matrix products, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def convolution_shapes(network, z, logsnr):  # type: ignore[no-untyped-def]
    """Every convolution that a forward pass meets: name -> (module, the shape of its input)."""
    import torch

    shapes, handles = {}, []
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):

            def note(module, inputs, output, name=name) -> None:  # type: ignore[no-untyped-def]
                shapes[name] = (module, inputs[0].shape)

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        network(z, logsnr)
    for handle in handles:
        handle.remove()
    return shapes


def best_layout(module, shape, device) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """Forward and backward of one convolution alone, in the faster of the two memory formats."""
    import torch

    def made(memory_format):  # type: ignore[no-untyped-def]
        layer = copy.deepcopy(module).to(memory_format=memory_format)
        x = torch.randn(shape, device=device).to(memory_format=memory_format).requires_grad_()
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
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return min((made(f) for f in (torch.contiguous_format, torch.channels_last)), key=seconds)


def peak_of_matmul(device) -> float:  # type: ignore[no-untyped-def]
    """GFLOP/s of a large matrix product: what the machine can do at best."""
    import torch

    a = torch.randn(1024, 1024, device=device)
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(taken) / 1e9


# --- the report -----------------------------------------------------------------------------------

RATIOS = {
    "training update / bare training": ("training update", "bare training"),
    "distillation update / bare distillation": ("distillation update", "bare distillation"),
    "sampling / bare forwards": ("sampling, {}", "bare forwards, {}"),
    "training update / convolutions alone": ("training update", "convolutions alone"),
    "training update / plain training loop": ("training update", "plain training loop"),
}


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

    measures = {}
    for name, values in times.items():
        measures[name] = {"seconds": spread(values)}
        measures[name]["images_per_second"] = bench.batch_size / statistics.median(values)
        gflop = bench.gflop.get(name.replace("bare training", "training update"))
        if gflop is not None:
            rate = gflop * bench.batch_size / statistics.median(values)
            measures[name]["gflop_per_second"] = rate
    ratios = {}
    steps = (f"{bench.steps} steps", str(bench.steps))
    for title, (top, bottom) in RATIOS.items():
        pair = (times[top.format(steps[0])], times[bottom.format(steps[1])])
        ratios[title] = spread([a / b for a, b in zip(*pair, strict=True)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(bench.device) / 2**20
    return {
        "config": str(arguments.config_path),
        "set": arguments.set,
        "device": str(bench.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": bench.batch_size,
        "parameters": bench.parameters,
        "gflop_per_image": bench.gflop,
        "matmul_peak_gflop_per_second": peak_of_matmul(bench.device),
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
        rate = measure.get("gflop_per_second")
        lines.append(
            f"| {name} | {s['median']:.1f} ({s['lower_quartile']:.1f} .. {s['upper_quartile']:.1f})"
            f" | {measure['images_per_second']:.0f} | {'' if rate is None else f'{rate:.0f}'} |"
        )
    lines += ["", "| ratio, paired by round | median (quartiles) |", "|---|---:|"]
    for name, ratio in result["ratios"].items():
        low, high = ratio["lower_quartile"], ratio["upper_quartile"]
        lines.append(f"| {name} | {ratio['median']:.3f} ({low:.3f} .. {high:.3f}) |")
    gflop = ", ".join(f"{k} {v:.3f}" for k, v in result["gflop_per_image"].items())
    lines += [
        "",
        f"GFLOP an image: {gflop}. Matrix products reach "
        f"{result['matmul_peak_gflop_per_second']:.0f} GFLOP/s here. "
        f"Peak memory {result['peak_memory_mib']:.0f} MiB.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
