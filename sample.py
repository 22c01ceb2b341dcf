"""Draws samples from a checkpoint: python sample.py --checkpoint FILE.pt"""

import argparse
import sys
from pathlib import Path

from utils.command import InputError, add_device_argument, parse, run_command, say

DESCRIPTION = """\
Draw samples from a checkpoint, which knows its network, its sampler and its steps. Without --count:
one picture, a grid. With --count: a folder of PNG files, or one .npz (arr_0, uint8, NHWC)."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE.pt")
    add("--count", type=int, metavar="N", help="how many images, as files instead of a grid")
    add("--batch_size", type=int, default=64, metavar="B", help="images at a time (64)")
    add("--output", type=Path, metavar="X", help="a .png (grid), a folder or a .npz (--count)")
    add("--trajectory", action="store_true", help="also a GIF and a strip of the denoising")
    add("--seed", type=int, default=0, help="image k is a function of the seed and k (0)")
    add("--labels", metavar="0,1,2", help="classes, in turn; --labels=-1: no class")
    add("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0)")
    add("--steps", type=int, metavar="N", help="by default the checkpoint's own")
    add("--sampler", help="ddim, ancestral, ancestral:large, ancestral:medium:F, dpm_solver++")
    add("--clip", action=argparse.BooleanOptionalAction, help="clip x_hat to [-1, 1] at each step")
    add_device_argument(parser)
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: sample(arguments))


def sample(arguments: argparse.Namespace) -> None:
    """Draws what the command line asks for and writes it."""
    from utils.build import load_denoiser
    from utils.checkpoint import load_checkpoint
    from utils.distributed import join_world
    from utils.sampling import SampleRequest, write_folder, write_grid, write_npz

    path, count, output = arguments.checkpoint, arguments.count, arguments.output
    checkpoint = load_checkpoint(path)
    if arguments.trajectory and count is not None:
        raise InputError("--trajectory: goes with a grid, not with --count")
    if count is not None and count < 1:
        raise InputError(f"--count {count}: take at least 1")
    with join_world(arguments.device) as world:
        request = SampleRequest.of(
            checkpoint,
            load_denoiser(checkpoint, path, world.device),
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
        folder = Path("output/samples")
        if count is None:
            output = output or folder / f"{name}.png"
            if output.suffix.lower() != ".png":
                raise InputError(f"--output {output}: a grid is a .png; for files give --count")
            grid = checkpoint.config.sampling.grid
            written = write_grid(output, request, grid, arguments.trajectory)
        elif output is not None and output.suffix == ".npz":
            written = write_npz(output, request, count)
        elif output is not None and output.suffix.lower() in (".png", ".gif", ".jpg", ".npy"):
            raise InputError(f"--output {output}: with --count, a folder or a .npz")
        else:
            written = write_folder(output or folder / name, request, count)
    say(f"{request.num_steps} steps of {request.sampler}: {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
