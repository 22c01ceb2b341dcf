"""Animates models that draw from the same noise, a network call a frame: python -m tools.race."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.command import InputError, path_name, run_script, say, whole_number

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Write a GIF in which models draw images from the same noise, one row for each. Every frame is one
call of each network: a student of 8 steps is done after 8 frames."""
RACING = ("teacher", "8-steps", "adversarial-1-step")
PUBLISHED = [Path(f"pretrained/mnist-{name}.safetensors") for name in RACING]
SCALE = 3  # of pixels
LABEL = 150  # width of the text beside a row, in pixels of the file


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and draws. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    rows = "one row for each; by default the teacher in pretrained/ and two students"
    add("--checkpoint", nargs="+", type=path_name, default=PUBLISHED, metavar="FILE", help=rows)
    add("--steps", type=whole_number(1, 256), default=64, metavar="N", help="of a base model (64)")
    add("--count", type=whole_number(1, 64), default=6, metavar="N", help="images in a row (6)")
    add("--seed", type=whole_number(0, 2**32), default=0, help="of the noise (0)")
    add("--output", type=path_name, default=Path("output/race.gif"), metavar="FILE.gif")
    return run_script(parser, argv, race)


def race(arguments: argparse.Namespace) -> None:
    """Draws with each model and writes the animation."""
    from pipeline.checkpoint import load_checkpoint
    from utils.images import save_gif

    if arguments.output.suffix != ".gif":
        raise InputError(f"--output {arguments.output}: give a name that ends in .gif")
    rows = []
    for path in arguments.checkpoint:
        checkpoint = load_checkpoint(path)
        steps = arguments.steps if checkpoint.num_steps is None else checkpoint.num_steps
        name = "teacher" if checkpoint.kind == "base" else "student"
        rows.append((name, states(checkpoint, path, steps, arguments)))
    if len({frames[0].shape[1:] for _, frames in rows}) > 1:
        raise InputError("--checkpoint: images of different sizes; give models of the same size")
    longest = max(len(frames) for _, frames in rows)
    animation = [frame([(name, at(n, frames)) for name, frames in rows]) for n in range(longest)]
    save_gif(arguments.output, animation, scale=1, milliseconds=60)
    say(f"written: {arguments.output}, {longest} frames")


def states(
    checkpoint: Any, path: Path, steps: int, arguments: argparse.Namespace
) -> "list[Tensor]":
    """Returns the images before the first step and after each, uint8 (B, C, H, W)."""
    import torch

    from pipeline.build import load_denoiser
    from pipeline.sampling import SampleRequest
    from utils.processes import World

    world = World(torch.device("cpu"))
    denoiser = load_denoiser(checkpoint, path, world.device)
    request = SampleRequest.of(checkpoint, denoiser, world, steps=steps, seed=arguments.seed)
    seen = []
    last = request.draw(
        range(arguments.count), lambda i, z, prediction: seen.append(request.codec.decode(z))
    )
    return [*seen, last]


def at(call: int, frames: "list[Tensor]") -> "tuple[str, Tensor]":
    """Returns a caption, and the images after so many calls, or the last ones."""
    total = len(frames) - 1
    done = min(call, total)
    calls = "call" if total == 1 else "calls"
    return f"{done} of {total} {calls}", frames[done]


def frame(rows: "list[tuple[str, tuple[str, Tensor]]]") -> "Tensor":
    """Returns a frame, uint8 (3, H, W): a row of images for each model, a text on its left."""
    import numpy as np
    import torch
    from einops import rearrange
    from PIL import Image, ImageDraw, ImageFont

    from utils.images import make_grid, to_pillow

    pictures = []
    for _, (_, images) in rows:
        grid = make_grid(images, columns=len(images))
        pictures.append(grid.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2))
    height, gap = pictures[0].shape[1], 2 * SCALE
    size = (LABEL + pictures[0].shape[2], len(rows) * (height + gap) - gap)
    canvas = Image.new("RGB", size, "black")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for n, (picture, (name, (text, _))) in enumerate(zip(pictures, rows, strict=True)):
        top = n * (height + gap)
        canvas.paste(to_pillow(picture).convert("RGB"), (LABEL, top))
        draw.text((10, top + height // 2 - 22), f"{name}\n{text}", fill="white", font=font)
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w")


if __name__ == "__main__":
    sys.exit(main())
