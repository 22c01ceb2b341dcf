"""Which recipe distils best in equal CPU time: python -m benchmarks.stages --checkpoint TEACHER.pt.

One stage: from a student that makes 2N steps, distill.py trains one that makes N, by each variant
of the recipe, for as many updates as fit into the same CPU time of one thread (timed on a few
updates of its own). Measured are its samples, also against its teacher's from the same noise, and
its loss on test images, whose noise and steps are the same for all. Run the same command again to
go on; --only runs some of them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments import cpu_seconds, make_parser, measure, planned_updates, samples_in
from utils.command import GO_ON, INTERRUPTED, OK, InputError, Stopped, parse, run_command, say
from utils.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

COMMON = [
    "distillation.learning_rate=0.0005",
    "distillation.batch_size=32",
    "distillation.loss_weight=snr_trunc",
]
VARIANTS = {
    "rate5": [],
    "rate05": ["distillation.learning_rate=0.00005"],
    "rate1": ["distillation.learning_rate=0.0001"],
    "rate2": ["distillation.learning_rate=0.0002"],
    "rate10": ["distillation.learning_rate=0.001"],
    "b16": ["distillation.batch_size=16"],
    "b64": ["distillation.batch_size=64"],
    "plus_one": ["distillation.loss_weight=snr_plus_one"],
    "constant": ["distillation.loss_weight=constant"],
    "rate1_late": ["distillation.learning_rate=0.0001", "distillation.time_exponent=3"],
    "rate2_late": ["distillation.learning_rate=0.0002", "distillation.time_exponent=3"],
    "rate5_late": ["distillation.time_exponent=3"],
    "rate2_later": ["distillation.learning_rate=0.0002", "distillation.time_exponent=6"],
    "rate2_late_b64": [
        "distillation.learning_rate=0.0002",
        "distillation.time_exponent=3",
        "distillation.batch_size=64",
    ],
}
HELD_OUT = 2000  # test images


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, distils and measures. Returns the exit code."""
    parser = make_parser(__doc__, seconds=300, steps=None, output="output/stages")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="TEACHER.pt")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: compare(arguments), GO_ON)


def compare(arguments: argparse.Namespace) -> None:
    """Distils and measures by each variant, and prints the table."""
    import torch

    torch.set_num_threads(1)
    for name in [] if arguments.table else arguments.only:
        folder = arguments.output / name
        path = distil_for(arguments.seconds, folder, arguments.checkpoint, VARIANTS[name])
        measure(path, folder, ["ddim"], None, arguments.count)
        known = folder / "agreement.json"
        if not known.exists():
            found = {
                "loss": held_out_loss(path, arguments.checkpoint),
                "distance": sample_distance(path, folder, arguments),
            }
            write_text(known, json.dumps(found) + "\n")
    say(table(arguments))


def distil_for(seconds: int, folder: Path, teacher_path: Path, changes: list[str]) -> Path:
    """Distils one stage in so much CPU time of one thread; returns the student's checkpoint."""
    import distill
    from pipeline.checkpoint import digest, load_checkpoint
    from training.folder import distillation_config

    teacher = load_checkpoint(teacher_path)
    if teacher.num_steps is None or teacher.num_steps % 2:
        raise InputError(f"{teacher_path}: not a student of an even number of steps")
    steps = teacher.num_steps // 2
    stage = [f"distillation.first_steps={steps}", "distillation.iterations=1"]
    overrides = [*stage, "distillation.updates_per_stage=1", *COMMON, *changes]
    config = distillation_config(teacher, teacher_path, None, overrides)
    start = digest(teacher.weights)
    updates = planned_updates(seconds, folder, lambda: cpu_seconds(config, teacher), start)
    student = folder / f"student-{steps}.pt"
    if not student.exists():
        more = [
            f"distillation.updates_per_stage={updates}",
            "distillation.checkpoint_every=1000000",
        ]
        command = ["--teacher_model_checkpoint", str(teacher_path), "--output", str(folder)]
        code = distill.main([*command, "--device", "cpu", "--set", *overrides, *more])
        if code == INTERRUPTED:
            raise Stopped
        if code != OK:
            raise InputError(f"{folder}: distillation ended before its time")
    return student


def held_out_loss(student_path: Path, teacher_path: Path) -> float:
    """The loss, weighted by max(1, SNR), over test images at noise and steps drawn once for all."""
    import torch

    from evaluation.gallery import real_images
    from pipeline.build import build_schedule, load_denoiser
    from pipeline.checkpoint import load_checkpoint
    from pipeline.codec import encode
    from training.loop import student_objective
    from utils.randomness import generator

    device = torch.device("cpu")
    student = load_checkpoint(student_path)
    objective = student_objective(
        load_denoiser(student, student_path, device),
        load_denoiser(load_checkpoint(teacher_path), teacher_path, device),
        build_schedule(student.config),
        student.num_steps or 1,
        "snr_trunc",
    )
    rng = generator("cpu", "held-out")
    losses = []
    with torch.no_grad():
        for images in real_images(student.config).reference[:HELD_OUT].split(100):
            losses.append(objective.loss(encode(images), None, *objective.draw(rng, images.shape)))
    return torch.cat(losses).mean().item()


def sample_distance(student_path: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """The mean squared distance of its samples to its teacher's, from the same noise."""
    from evaluation.comparison import squared_distance
    from pipeline.checkpoint import load_checkpoint

    def samples(path: Path, where: Path) -> "Tensor":
        checkpoint = load_checkpoint(path)
        steps = checkpoint.num_steps or 1
        return samples_in(where).images(checkpoint, path, "ddim", steps, arguments.count)

    teachers = samples(arguments.checkpoint, arguments.output / "teacher")
    return squared_distance(samples(student_path, folder), teachers)


def table(arguments: argparse.Namespace) -> str:
    """What is known, the nearest to its teacher first, as Markdown."""
    found = []
    for name in VARIANTS:
        files = ("result.json", "agreement.json")
        files_there = [path for file in files if (path := arguments.output / name / file).exists()]
        if len(files_there) == len(files):
            result, to_teacher = (json.loads(path.read_text()) for path in files_there)
            found.append((to_teacher["distance"], to_teacher["loss"], name, result))
    lines = [
        "| variant | changes | updates | images seen | distance to its teacher's samples "
        "| loss on test images | Frechet distance | more than 90% sure |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for distance, loss, name, result in sorted(found, key=lambda item: item[0]):
        row, seen = result["rows"]["ddim"], result["updates"] * result["batch_size"]
        frechet = f"{row['frechet']:.2f} ± {row['interval']:.2f}"
        changes = ", ".join(change.partition(".")[2] for change in VARIANTS[name])
        lines.append(
            f"| {name} | {changes} | {result['updates']:,} | {seen:,} | {distance:.5f} "
            f"| {loss:.6f} | {frechet} | {row['confident']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
