"""Imports a diffusers pipeline as a teacher: python -m tools.import_diffusers FOLDER --output F."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from utils.command import InputError, path_name, run_script, say

if TYPE_CHECKING:
    from pipeline.diffusers_folder import NetworkFile, Scheduler

DESCRIPTION = """\
Write the UNet2DModel of a diffusers pipeline, with the noise levels of its DDPM or DDIM scheduler,
into a .safetensors file that distill.py, sample.py and evaluate.py take. Only JSON and safetensors
are read. Unless --set data.name says otherwise, the images to distil on are an image_folder."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and imports. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("folder", type=path_name, help="with model_index.json, unet/ and scheduler/")
    example = "values of the config to write, e.g. data.name=cifar10"
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=example)
    add("--output", type=path_name, required=True, metavar="FILE.safetensors")
    return run_script(parser, argv, import_pipeline)


def import_pipeline(arguments: argparse.Namespace) -> None:
    """Reads the pipeline, checks every name and shape, and writes it as .safetensors."""
    from pipeline import diffusers_folder as source
    from pipeline.checkpoint import Checkpoint, publish_checkpoint
    from pipeline.checkpoint_checks import require_name
    from pipeline.config import make_config
    from pipeline.network import misfit
    from pipeline.values import TABLE
    from utils.strict_yaml import override

    folder, output = arguments.folder, arguments.output
    if output.suffix != ".safetensors":
        raise InputError(f"--output {output}: give a name that ends in .safetensors")
    name = folder.resolve().name
    require_name(name, folder)
    source.require_pipeline(folder)
    unet, place = source.place_of(folder, "unet"), source.place_of(folder, "scheduler")
    scheduler = source.read_scheduler(place / "scheduler_config.json")
    network = source.read_network(unet / "config.json")
    levels = scheduler.grid[:-1].flip(0)
    ladder = suggested_ladder(len(levels), scheduler.prediction)
    values = config_values(network, scheduler, ladder)
    config = make_config(override(values, arguments.set), str(folder))
    weights = source.read_weights(unet)
    model = {"table": levels, **{f"unet.{key}": tensor for key, tensor in weights.items()}}
    if config.diffusion.schedule != TABLE:
        raise InputError(f"{folder}: diffusion.schedule: {TABLE}, the pipeline's own; leave it out")
    if wrong := misfit(model, config):
        raise InputError(f"{unet / source.WEIGHTS}: not the network of its config.json: {wrong}")
    checkpoint = Checkpoint(
        kind="base",
        name=name,
        config=config,
        update=0,
        stage=0,
        grid=tuple(scheduler.grid.tolist()),
        model=model,
    )
    publish_checkpoint(output, checkpoint, half=False)
    steps = ", ".join(map(str, config.distillation.steps()))
    command = ["python", "distill.py", "--teacher_model_checkpoint", str(output)]
    if config.data.name == "image_folder" and config.data.root == "data":
        command += ["--set", "data.root=DIR"]
    say(
        f"written: {output}: a base model of {len(levels)} noise levels that predicts "
        f"{scheduler.prediction}, {sum(t.numel() for t in weights.values()):,} parameters\n"
        f"its ladder (--set distillation.ladder): {steps}; the students "
        f"predict {config.distillation.prediction or scheduler.prediction}\n"
        f"next: {shlex.join(command)}"
    )


def config_values(
    network: "NetworkFile", scheduler: "Scheduler", ladder: list[int]
) -> dict[str, Any]:
    """Returns the config of a pipeline's network, levels and sampler, and of its ladder."""
    from pipeline import diffusers_folder as source

    num_levels = len(scheduler.grid) - 1
    return {
        "data": {
            "name": "image_folder",
            "image_size": network.sample_size,
            "channels": network.in_channels,
        },
        "model": {
            "name": "diffusers_unet",
            "config": source.network_arguments(network),
            "num_train_timesteps": num_levels,
            "num_classes": network.num_class_embeds,
            "dropout": network.dropout,
        },
        "diffusion": {"prediction": scheduler.prediction, "schedule": "table"},
        "distillation": {
            "ladder": ladder,
            "prediction": "v" if scheduler.prediction == "eps" else None,
        },
        "sampling": {"steps": num_levels, "clip": scheduler.clip},
    }


def suggested_ladder(num_levels: int, prediction: str) -> list[int]:
    """Returns a ladder from all levels to one step: 1000, 500, 250, 125, 25, 5, 1.

    Each student has its teacher's steps divided by their smallest factor. A teacher that predicts
    eps has first a student of as many steps, which learns to predict v.
    """
    ladder = [num_levels] * (2 if prediction == "eps" or num_levels == 1 else 1)
    while (steps := ladder[-1]) > 1:
        ladder.append(steps // next(n for n in range(2, steps + 1) if steps % n == 0))
    return ladder


if __name__ == "__main__":
    sys.exit(main())
