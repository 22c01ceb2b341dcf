"""Trains an autoencoder: python -m tools.train_autoencoder --config_path FILE.yaml."""

import argparse
import sys
from pathlib import Path

from utils.command import GO_ON, add_common_arguments, path_name, run_script, say

DESCRIPTION = """\
Train the autoencoder that a YAML file describes (its sections autoencoder, data, training and
engine). Writes autoencoder-<update>.pt with a picture beside each, and at the end
autoencoder.safetensors, which other configs name in codec.file; run the same command again to go on
after a stop. It is an AutoencoderKL of diffusers, which must be installed."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--config_path", type=path_name, required=True, metavar="FILE.yaml")
    add_common_arguments(parser)
    return run_script(parser, argv, train, GO_ON)


def train(arguments: argparse.Namespace) -> None:
    """Trains the autoencoder to its last update, or goes on from its newest checkpoint."""
    from evaluation.curves import draw_loss_curve
    from pipeline.build import build_dataset
    from pipeline.checkpoint_checks import require_name
    from pipeline.config import load_config
    from training.autoencoder import autoencoder_stage, train_autoencoder
    from training.folder import open_folder
    from training.loop import rows_of_process
    from training.starts import Run
    from training.tracking import open_tracker
    from utils.processes import join_world
    from utils.strict_yaml import write_yaml

    config = load_config(arguments.config_path, arguments.set)
    if arguments.print_config:
        say(write_yaml(config.model_dump(mode="json")))
        return
    name = arguments.config_path.stem
    require_name(name, arguments.config_path)
    output = arguments.output or Path(config.output or f"output/{name}")
    stage = autoencoder_stage(config)
    with join_world(arguments.device) as world:
        rows_of_process(stage.batch_size, stage.accumulate, world)  # raises InputError
        tracker = open_tracker(arguments.track, output, name, config.model_dump(mode="json"))
        dataset = build_dataset(config, world.device)
        run = Run(config, name, output, world, dataset, tracker)
        with open_folder(output, world, "autoencoder-", arguments.restart):
            path = train_autoencoder(run, stage)
            if world.leads:
                draw_loss_curve(output)
    say(
        f"trained: {path}, pictures of it in {output}/autoencoder-*.png, the loss in "
        f"{output / 'loss.png'}\nnext: python train.py --config_path FILE.yaml --set "
        f"codec.name=autoencoder codec.file={path} sampling.clip=false"
    )


if __name__ == "__main__":
    sys.exit(main())
