"""The paper's first table on MNIST: what the network predicts, and how its loss is weighted.

python -m benchmarks.ablation: every output type with every loss weight (Salimans & Ho 2022, table
1), a small network, six minutes of CPU time of one thread each; a second seed for the best four,
once all are known. Run the same command again to go on; --only runs some of the output types, so
that two processes can share the work.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.experiments import Diverged, losses_of, make_parser, measure, train_for
from utils.command import GO_ON, parse, run_command, say
from utils.files import write_text

BASE = Path("configs/mnist_small.yaml")
OUTPUTS = ("x", "eps", "v", "both")
WEIGHTS = ("snr", "snr_trunc", "snr_plus_one")
COMMON = [
    "model.channels=24",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "training.batch_size=32",
    "training.learning_rate=0.001",
    "training.learning_rate_decay=linear",
    "training.warmup=200",
    "training.times=stratified",
]
SECOND_SEED = 1
REPEATED = 4


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, trains and measures. Returns the exit code."""
    parser = make_parser(__doc__, seconds=360, steps=64, output="output/ablation")
    parser.add_argument("--only", nargs="+", choices=OUTPUTS, default=OUTPUTS)
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: ablate(arguments), GO_ON)


def ablate(arguments: argparse.Namespace) -> None:
    """All cells, then the best once more with another seed, then the table."""
    import torch

    torch.set_num_threads(1)
    cells = [(output, weight) for output in OUTPUTS for weight in WEIGHTS]
    if not arguments.table:
        for cell in cells:
            if cell[0] in arguments.only:
                run_cell(arguments, *cell, seed=0)
        known = {cell: result_of(arguments, *cell, 0) for cell in cells}
        if all(rows is not None for rows in known.values()):
            distances = {cell: rows["ddim"]["frechet"] for cell, rows in known.items() if rows}
            for cell in sorted(distances, key=lambda c: distances[c])[:REPEATED]:
                if cell[0] in arguments.only:
                    run_cell(arguments, *cell, seed=SECOND_SEED)
    say(table(arguments))


def folder_of(arguments: argparse.Namespace, output: str, weight: str, seed: int) -> Path:
    """Where a cell lies."""
    return Path(arguments.output) / f"{output}-{weight}-{seed}"


def run_cell(arguments: argparse.Namespace, output: str, weight: str, seed: int) -> None:
    """Trains and measures one."""
    folder = folder_of(arguments, output, weight, seed)
    if result_of(arguments, output, weight, seed) == {}:
        return  # diverged
    changes = [f"seed={seed}", f"diffusion.prediction={output}", f"diffusion.loss_weight={weight}"]
    try:
        path = train_for(arguments.seconds, folder, BASE, [*COMMON, *changes])
    except Diverged:
        write_text(folder / "result.json", json.dumps({"rows": None}) + "\n")
        return
    measure(path, folder, ["ddim", "ancestral"], arguments.steps, arguments.count)


def result_of(
    arguments: argparse.Namespace, output: str, weight: str, seed: int
) -> dict[str, dict[str, float]] | None:
    """A cell's rows by sampler, none where its training diverged, None where it has not run."""
    path = folder_of(arguments, output, weight, seed) / "result.json"
    return (json.loads(path.read_text())["rows"] or {}) if path.exists() else None


def table(arguments: argparse.Namespace) -> str:
    """Frechet distances with intervals, DDIM / ancestral; then the losses of the same cells.

    A second seed's after a semicolon.
    """
    distances = rows_of(lambda output, weight: distances_of(arguments, output, weight))
    losses = rows_of(lambda output, weight: course_of(arguments, output, weight))
    return f"{distances}\n\nLoss around update 1,000 -> in the last tenth:\n\n{losses}"


def rows_of(entry: Callable[[str, str], str]) -> str:
    """A table with an entry for each output type and loss weight, as Markdown."""
    lines = [
        f"| network's output | {' | '.join(WEIGHTS)} |",
        f"|---|{'|'.join('---:' for _ in WEIGHTS)}|",
    ]
    lines += [f"| {o} | {' | '.join(entry(o, w) for w in WEIGHTS)} |" for o in OUTPUTS]
    return "\n".join(lines)


def distances_of(arguments: argparse.Namespace, output: str, weight: str) -> str:
    """A cell's distances in both samplers, of each seed that has run."""
    found = [result_of(arguments, output, weight, seed) for seed in (0, SECOND_SEED)]
    texts = [
        " / ".join(f"{row['frechet']:.2f} ± {row['interval']:.2f}" for row in rows.values())
        or "diverged"
        for rows in found
        if rows is not None
    ]
    return "; ".join(texts)


def course_of(arguments: argparse.Namespace, output: str, weight: str) -> str:
    """A cell's loss in its first seed, where it has run."""
    known = result_of(arguments, output, weight, 0)
    return " -> ".join(losses_of(folder_of(arguments, output, weight, 0))) if known else ""


if __name__ == "__main__":
    sys.exit(main())
