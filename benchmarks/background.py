"""Which noise levels leave noise in the background: python -m benchmarks.background --checkpoint X.

On the pixels along the edge, which are black in the digits: how far x_hat is from black, in levels
of 255 (root mean square), for noised test images and on the way of the sampler; and how much noise
is in z there, as a multiple of what the noise level says, which a perfect sampler keeps at 1.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.steps import times_of
from diffusion.gaussian import Prediction, clipped, diffuse
from diffusion.samplers import ddim
from diffusion.schedule import alpha_sigma, on_device
from evaluation.gallery import DIGITS, real_images
from evaluation.quality import BORDER
from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import load_checkpoint
from pipeline.codec import encode
from pipeline.network import build_schedule
from utils.command import InputError, path_name, run_script, say, whole_number
from utils.randomness import ImageNoise

ROWS = 16  # of the table at most, beside the last step
HALF_RANGE = 127.5  # levels of 255 to a unit of the model's range


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_name, required=True, metavar="FILE")
    add("--steps", type=whole_number(2, 2**20), default=64, help="of a base model (64)")
    add("--count", type=whole_number(2, 10**4), default=200, help="images of each kind (200)")
    return run_script(parser, argv, lambda arguments: say(table(**vars(arguments))))


@torch.no_grad()
def table(checkpoint: Path, steps: int, count: int) -> str:
    """Returns a Markdown table with up to ROWS of the sampler's steps, from noise to image."""
    cpu = torch.device("cpu")
    model = load_checkpoint(checkpoint)
    if model.config.model.num_classes is not None or model.config.codec.name != "pixels":
        raise InputError(f"{checkpoint}: this is for models of pixels without classes")
    if model.config.data.name not in DIGITS:
        raise InputError(
            f"{checkpoint}: of {model.config.data.name}; the ground of digits is black"
        )
    schedule = build_schedule(model.config)  # raises InputError
    denoise = load_denoiser(model, checkpoint, cpu)
    levels = model.levels(None if model.num_steps is not None else steps)
    x = encode(real_images(model.config).reference[:count])
    count = len(x)
    eps = ImageNoise(model.config.seed, range(count), image_shape(model.config), cpu).draw()
    on_path: dict[int, tuple[float, float]] = {}

    def look(step: int, z: Tensor, prediction: Prediction) -> None:
        alpha, sigma = alpha_sigma(levels[len(levels) - 2 - step].expand(len(z)), z)
        noise = rim((z + alpha) / sigma)  # black is -1
        on_path[step] = off_black(prediction.x), noise.square().mean().sqrt().item()

    drawn = ddim(clipped(denoise), eps, on_device(levels, cpu), on_step=look)
    times = times_of(levels, schedule)
    lines = [
        "| t | logsnr | noise of z, levels | x_hat of noised images, off black | on the path, off "
        "black | noise of z on the path |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    number = len(levels) - 1
    for n in sorted({number - 1, *range(0, number, -(-number // ROWS))}):
        level = levels[n].expand(count)
        alpha, sigma = alpha_sigma(level, x)
        noised = denoise(diffuse(x, eps, level), level)
        missed, noise = on_path[number - 1 - n]
        spread = HALF_RANGE * (sigma / alpha)[0].item()
        lines.append(
            f"| {times[n]:.3f} | {levels[n]:.2f} | {spread:.1f} | {off_black(noised.x):.2f} | "
            f"{missed:.2f} | {noise:.2f} |"
        )
    lines.append(f"| the sample | | | | {off_black(drawn):.2f} | |")
    return "\n".join(lines)


def rim(images: Tensor) -> Tensor:
    """The pixels along the edge, of all images."""
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    return images[..., ~inside]


def off_black(x: Tensor) -> float:
    """The root mean square distance of the rim from black, in levels of 255, clipped to white."""
    return HALF_RANGE * (rim(x.clamp(-1, 1)) + 1).square().mean().sqrt().item()


if __name__ == "__main__":
    sys.exit(main())
