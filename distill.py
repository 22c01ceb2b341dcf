"""Distils a checkpoint into fewer steps: python distill.py --teacher_model_checkpoint F.pt."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.command import (
    GO_ON,
    add_common_arguments,
    path_name,
    run_script,
    say,
    whole_number,
)

if TYPE_CHECKING:
    from training.stage import Stage
    from training.starts import Initial, Run

DESCRIPTION = """\
Distil a model into fewer sampling steps: each stage copies its teacher into a student that learns
to do several of its steps in one. Writes student-<steps>.pt and a grid of samples for every stage,
then a table and pictures of the ladder; run the same command again to go on."""
INITIALISE = """\
the first student begins with these weights instead of its teacher's; of several students' files,
each student with those of as many steps"""
CONFIG = "its distillation, sampling, engine, data.root and data.workers are used"


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and distils. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--teacher_model_checkpoint", type=path_name, required=True, metavar="FILE.pt")
    add("--config_path", type=path_name, metavar="FILE.yaml", help=CONFIG)
    add("--initial_sampling_steps", type=int, metavar="N", help="the FIRST student's steps")
    count = whole_number(1, 2**20)
    add("--distillation_iterations", type=count, metavar="N", help="the number of students")
    add("--initialise", nargs="+", default=[], type=path_name, metavar="FILE", help=INITIALISE)
    add_common_arguments(parser)
    return run_script(parser, argv, distill, GO_ON)


def distill(arguments: argparse.Namespace) -> None:
    """Distils the ladder stage by stage, or goes on where an earlier run was stopped."""
    from pipeline.build import build_dataset
    from pipeline.checkpoint import load_checkpoint
    from pipeline.checkpoint_checks import require_name
    from pipeline.latents import with_codec
    from training.folder import open_folder, require_elsewhere, require_same_ladder
    from training.ladder import distillation_config
    from training.loop import rows_of_process
    from training.stage import student_stages
    from training.starts import Run, features_of, initial_of
    from training.tracking import open_tracker
    from utils.processes import join_world
    from utils.strict_yaml import write_yaml

    base_path = arguments.teacher_model_checkpoint
    base = load_checkpoint(base_path)
    config = distillation_config(
        base,
        base_path,
        arguments.config_path,
        arguments.set,
        arguments.initial_sampling_steps,
        arguments.distillation_iterations,
    )
    if arguments.print_config:
        say(write_yaml(config.model_dump(mode="json")))
        return
    name = arguments.config_path.stem if arguments.config_path else base.name
    if base.kind == "student" and arguments.config_path is None:
        name = f"{name}-from-{base.num_steps}-steps"
    require_name(name, arguments.config_path or base_path)
    output = arguments.output or Path(f"output/distilled/{name}")
    stages = student_stages(config, base.stage + 1)
    begin = initial_of([(file, load_checkpoint(file)) for file in arguments.initialise], stages)
    require_elsewhere(output, base_path, *arguments.initialise)
    config = with_codec(config, arguments.config_path or base_path)
    recipe = config.distillation
    with join_world(arguments.device) as world:
        rows_of_process(recipe.batch_size, recipe.accumulate, world)  # raises InputError
        tracker = open_tracker(arguments.track, output, name, config.model_dump(mode="json"))
        dataset = build_dataset(config, world.device, recipe.data)
        features = features_of(config, (base_path, base), world.device)
        run = Run(config, name, output, world, dataset, tracker, features)
        with open_folder(output, world, "student-", arguments.restart):
            if world.leads:
                require_same_ladder(output, recipe.steps()[1:], base.stage + 1)
            train_ladder(run, stages, (base_path, base), begin)
    steps = recipe.steps()[-1]
    say(
        f"\ndistilled to {steps} steps: {output}/student-*.pt; the table in "
        f"{output}/ladder.md, comparison.png, ladder.png and loss.png beside it\n"
        f"next: python sample.py --checkpoint {output}/student-{steps}.pt"
    )


def train_ladder(
    run: "Run", stages: "Sequence[Stage]", base: "Initial", begin: "Mapping[int, Initial]"
) -> None:
    """Trains every student, each the teacher of the next, and reports on all of them.

    base: the first teacher's file, and its checkpoint. begin: what students begin with instead of
    their teacher's weights, by the numbers of their stages.
    """
    from evaluation.curves import draw_loss_curve
    from evaluation.report import LadderReport
    from training.stages import train_stage
    from training.starts import student_start

    path, teacher = base
    report = LadderReport(run, teacher, path)
    for stage in stages:
        start = student_start(run, stage, teacher, begin.get(stage.number))
        teacher = train_stage(run, stage, start, teacher)
        report.add(teacher)
    report.finish()
    if run.world.leads:
        draw_loss_curve(run.output)


if __name__ == "__main__":
    sys.exit(main())
