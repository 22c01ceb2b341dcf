"""Trains a diffusion model: python train.py --config_path configs/quickstart.yaml."""

import argparse
import shlex
import sys
from pathlib import Path

from utils.command import GO_ON, InputError, add_common_arguments, path_name, run_script, say

DESCRIPTION = """\
Train the diffusion model that a YAML file describes. Writes diffusion-<update>.pt and a grid of
samples every training.checkpoint_every updates and at the end; run the same command again to go
on after a stop."""
INITIALISE = """\
start from the weights of a checkpoint (.pt or .safetensors; the average if it has one) instead of
random ones; give it again to go on"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--config_path", type=path_name, required=True, metavar="FILE.yaml")
    add("--initialise", type=path_name, metavar="FILE", help=INITIALISE)
    add_common_arguments(parser)
    return run_script(parser, argv, train, GO_ON)


def train(arguments: argparse.Namespace) -> None:
    """Trains the base model to its last update, or goes on from its newest checkpoint."""
    from evaluation.curves import draw_loss_curve
    from pipeline.build import build_dataset
    from pipeline.checkpoint import load_checkpoint
    from pipeline.checkpoint_checks import require_name
    from pipeline.config import load_config
    from pipeline.latents import with_codec, with_folder_measured
    from pipeline.network import build_schedule
    from training.folder import open_folder, require_elsewhere
    from training.loop import rows_of_process
    from training.stage import base_stage
    from training.stages import train_stage
    from training.starts import Run, base_start
    from training.tracking import open_tracker
    from utils.processes import join_world
    from utils.strict_yaml import write_yaml

    config = load_config(arguments.config_path, arguments.set)
    if arguments.print_config:
        say(write_yaml(config.model_dump(mode="json")))
        return
    name, file = arguments.config_path.stem, arguments.initialise
    require_name(name, arguments.config_path)
    build_schedule(config)  # raises InputError if there is none
    if config.model.guidance:
        raise InputError(
            f"{arguments.config_path}: model.guidance: true, but only students take the guidance "
            "weight (distillation.guidance); leave it out"
        )
    output = arguments.output or Path(config.output or f"output/{name}")
    initial = None if file is None else (file, load_checkpoint(file))
    require_elsewhere(output, *([] if file is None else [file]))
    config = with_codec(config, arguments.config_path)
    with join_world(arguments.device) as world:
        stage = base_stage(config)
        rows_of_process(stage.batch_size, stage.accumulate, world)  # raises InputError
        dataset = build_dataset(config, world.device)
        with open_folder(output, world, "diffusion-", arguments.restart):
            where = arguments.config_path
            config = with_folder_measured(config, where, output, dataset, world)
            values = config.model_dump(mode="json")
            tracker = open_tracker(arguments.track, output, name, values)
            run = Run(config, name, output, world, dataset, tracker)
            trained = train_stage(run, stage, base_start(run, initial))
            if world.leads:
                draw_loss_curve(output)
    checkpoint = output / f"diffusion-{trained.update}.pt"
    say(
        f"trained: {checkpoint}, its samples in {checkpoint.with_suffix('.png')}, "
        f"the loss in {output / 'loss.png'}\nnext: {next_command(arguments, checkpoint)}"
    )


def next_command(arguments: argparse.Namespace, checkpoint: Path) -> str:
    """Returns the command that distils the checkpoint, with its YAML unless --set changed it."""
    command = ["python", "distill.py", "--teacher_model_checkpoint", str(checkpoint)]
    if not arguments.set:
        command += ["--config_path", str(arguments.config_path)]
    if arguments.output is not None:
        command += ["--output", f"output/distilled/{arguments.output.resolve().name}"]
    return shlex.join(command)


if __name__ == "__main__":
    sys.exit(main())
