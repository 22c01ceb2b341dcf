"""Draws samples from a checkpoint: python sample.py --checkpoint FILE.pt"""

import argparse
import sys
from pathlib import Path

from utils.command import (
    SEED,
    InputError,
    add_device_argument,
    add_engine_arguments,
    path_name,
    run_script,
    say,
    warn,
    whole_number,
)

DESCRIPTION = """\
Draw samples from a checkpoint, with the sampler and the steps it was made for. Without --count:
one picture, a grid. With --count: a folder of PNG files, or one .npz (arr_0, uint8, NHWC). Names
with the suffix of another file type (.webp, .zip, ..) are refused; a folder may be called run.1."""

SAMPLERS = "ddim, ancestral, ancestral:large, ancestral:medium:F, dpm_solver++, consistency"


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", type=path_name, required=True, metavar="FILE.pt")
    count, size = whole_number(1, 2**31), whole_number(1, 2**20)
    add("--count", type=count, metavar="N", help="number of images, as files instead of a grid")
    add("--batch_size", type=size, default=64, metavar="B", help="images at a time (64)")
    add("--output", type=path_name, metavar="X", help="a .png (grid), a folder or a .npz (--count)")
    add(
        "--trajectory",
        action="store_true",
        help="also a GIF and a strip of the denoising, in one batch",
    )
    add("--seed", type=SEED, default=0, help="image k is a function of the seed and k (0)")
    add("--labels", metavar="0,1,2", help="classes, in turn; --labels=-1: no class")
    add("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0)")
    add("--steps", type=size, metavar="N", help="by default the checkpoint's own")
    add("--sampler", help=SAMPLERS)
    add("--clip", action=argparse.BooleanOptionalAction, help="clip x_hat to [-1, 1] at each step")
    add_engine_arguments(parser)
    add_device_argument(parser)
    return run_script(parser, argv, sample)


def sample(arguments: argparse.Namespace) -> None:
    """Draws and writes the images that the command line asks for."""
    from pipeline.build import load_denoiser
    from pipeline.checkpoint import load_checkpoint
    from pipeline.engine import asked_engine
    from pipeline.sample_files import write_folder, write_grid, write_npz
    from pipeline.sampling import SampleRequest, warn_of_other_use
    from training.folder import require_output
    from utils.processes import join_world

    path, count, output = arguments.checkpoint, arguments.count, arguments.output
    checkpoint = load_checkpoint(path)
    if arguments.trajectory and count is not None:
        raise InputError("--trajectory: goes with a grid, not with --count")
    asked = (arguments.precision, arguments.compile)
    with join_world(arguments.device) as world:
        engine = asked_engine(checkpoint.config.engine, world.device, *asked)
        request = SampleRequest.of(
            checkpoint,
            load_denoiser(checkpoint, path, world.device, engine),
            world,
            steps=arguments.steps,
            sampler=arguments.sampler,
            clip=arguments.clip,
            seed=arguments.seed,
            labels=arguments.labels,
            guidance=arguments.guidance,
            batch_size=arguments.batch_size,
        )
        name = f"{checkpoint.name}-{path.stem}"
        if request.num_steps != checkpoint.num_steps:
            name += f"-{request.num_steps}-steps"
        output = output or Path("output/samples") / (f"{name}.png" if count is None else name)
        require_output(output, count is not None)
        warn_of_other_use(checkpoint, arguments.steps, arguments.sampler)
        if arguments.clip is False and checkpoint.config.diffusion.clip:
            warn("--no-clip: changes nothing; this model was trained to clip x_hat itself")
        if count is None:
            grid = checkpoint.config.sampling.grid
            written = write_grid(output, request, grid, arguments.trajectory)
        elif output.suffix.lower() == ".npz":
            written = write_npz(output, request, count)
        else:
            written = write_folder(output, request, count)
    steps = "1 step" if request.num_steps == 1 else f"{request.num_steps} steps"
    say(f"{steps} of {request.sampler}: {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
