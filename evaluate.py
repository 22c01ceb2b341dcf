"""Measures the quality of samples: python evaluate.py --checkpoint A.pt B.pt --steps 8 1024."""

import argparse
import sys
from pathlib import Path

from utils.command import GO_ON, InputError, add_device_argument, parse, run_command, say

DESCRIPTION = """\
Draw images from checkpoints, all from the same noise, and compare them with real ones. Writes
results.md, .json, .csv and distances.png into the output folder, whose earlier rows stay; run the
same command again to go on after a stop."""
KEPT = f"the images drawn so far are kept: {GO_ON}"


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE", help="models, students")
    add("--images", type=Path, nargs="+", default=[], metavar="X", help="folders or .npz files")
    add("--steps", type=int, nargs="+", metavar="N", help="of base models; a student has its own")
    add("--sampler", nargs="+", default=["ddim"], metavar="NAME", help="of base models (ddim)")
    add("--count", type=int, default=5000, metavar="N", help="images of each (5000), drawn by 125")
    add("--max_calls", type=int, metavar="M", help="fewer images where steps x images is more")
    add("--config_path", type=Path, metavar="FILE.yaml", help="what --images are compared with")
    add("--features", help="digits (of MNIST) or inception; by default what fits the data")
    add("--data_root", metavar="DIR", help="where the real images lie, if not where they lay")
    add("--seed", type=int, default=0, help="of the noise (0)")
    add("--batch_size", type=int, default=125, metavar="B", help="images at a time (125)")
    add("--output", type=Path, default=Path("output/evaluation"), metavar="DIR")
    add_device_argument(parser)
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: evaluate(arguments), KEPT)


def evaluate(arguments: argparse.Namespace) -> None:
    """Draws all images first, then measures them and writes the tables."""
    from evaluation.comparison import (
        draw_all,
        known_results,
        measure_all,
        plan_jobs,
        require_different_names,
        require_same_data,
    )
    from evaluation.features import make_extractor
    from evaluation.gallery import DIGITS, Gallery, read_images, real_images
    from evaluation.results import markdown, summary
    from utils.checkpoint import load_checkpoint
    from utils.config import load_config
    from utils.distributed import World, join_world
    from utils.runs import require_no_download

    if min(arguments.count, arguments.batch_size, arguments.max_calls or 1) < 1:
        raise InputError("--count, --batch_size, --max_calls: take at least 1")
    if any(not 1 <= steps <= 2**20 for steps in arguments.steps or []):
        raise InputError(f"--steps: take from 1 to {2**20}")
    output = arguments.output
    checkpoints = {path: load_checkpoint(path) for path in arguments.checkpoint}
    if arguments.config_path is not None:
        config = load_config(arguments.config_path, [])
    elif checkpoints:
        config = next(iter(checkpoints.values())).config
    else:
        raise InputError("--checkpoint: give checkpoints, or --images with --config_path")
    data = config.data
    if arguments.data_root is not None:
        data = data.model_copy(update={"root": arguments.data_root})
        config = config.model_copy(update={"data": data})
    elif arguments.config_path is None:
        require_no_download(data, next(iter(checkpoints)), "--data_root DIR")
    require_same_data(checkpoints, data)
    jobs = plan_jobs(
        checkpoints, arguments.sampler, arguments.steps, arguments.count, arguments.max_calls
    )
    require_different_names(checkpoints, arguments.images)
    foreign = {
        path.stem: read_images(path, data.image_size, data.channels) for path in arguments.images
    }
    for name, images in foreign.items():
        if len(images) < 10:
            raise InputError(f"{name}: {len(images)} images; to measure takes at least 10")
    with join_world(arguments.device) as world:
        extract = make_extractor(
            arguments.features or ("digits" if data.name in DIGITS else "inception"), world.device
        )
        gallery = Gallery(output / "images", world, arguments.seed, arguments.batch_size)
        real = real_images(config)
        known_results(output, extract, real)  # or refused, before hours of drawing
        draw_all(jobs, gallery)
        if not world.leads:
            return
        alone = Gallery(gallery.folder, World(world.device), gallery.seed, gallery.batch_size)
        results = measure_all(jobs, foreign, extract, real, alone, output)
    say("\n\n".join(["", markdown(results), summary(results)]).rstrip())
    say(
        f"\nwritten: {output}/results.md, .json, .csv and distances.png; "
        f"the images are in {output}/images"
    )


if __name__ == "__main__":
    sys.exit(main())
