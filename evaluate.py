"""Measures the quality of samples: python evaluate.py --checkpoint A.pt B.pt --steps 8 1024."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from utils.command import (
    GO_ON,
    SEED,
    InputError,
    add_device_argument,
    add_engine_arguments,
    path_name,
    run_script,
    say,
    whole_number,
)

if TYPE_CHECKING:
    from pipeline.checkpoint import Checkpoint
    from pipeline.config import Config

DESCRIPTION = """\
Draw images from checkpoints, all from the same noise, and compare them with real ones. Writes
results.md, .json, .csv and distances.png into the output folder and keeps its earlier rows; run the
same command again to go on after a stop."""
GUIDANCE = "weights of classifier-free guidance, for models with classes (0)"
STEPS = "for base models and consistency students; other students have their own"
COUNT = "images of each (5000)"
CALLS = "draw fewer images if steps x images is more"
WRITTEN = ("results.md", "results.json", "results.csv", "distances.png")
KEPT = f"the images drawn so far are kept: {GO_ON}"


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    size, file = whole_number(1, 2**20), path_name
    add("--checkpoint", type=file, nargs="+", default=[], metavar="FILE", help="models, students")
    add("--images", type=file, nargs="+", default=[], metavar="X", help="folders or .npz files")
    add("--steps", type=size, nargs="+", metavar="N", help=STEPS)
    add("--sampler", nargs="+", default=["ddim"], metavar="NAME", help="for base models (ddim)")
    add("--guidance", type=float, nargs="+", default=[0.0], metavar="W", help=GUIDANCE)
    add("--count", type=whole_number(1, 10**7), default=5000, metavar="N", help=COUNT)
    add("--max_calls", type=whole_number(1, 2**63), metavar="M", help=CALLS)
    add(
        "--config_path",
        type=file,
        metavar="FILE.yaml",
        help="names the real images to compare with",
    )
    add("--features", help="digits (MNIST) or inception; by default the one that fits the data")
    add("--data_root", type=file, metavar="DIR", help="folder of the real images, if it has moved")
    add("--seed", type=SEED, default=0, help="of the noise (0)")
    add("--batch_size", type=size, default=125, metavar="B", help="images at a time (125)")
    add("--output", type=file, default=Path("output/evaluation"), metavar="DIR")
    add_engine_arguments(parser)
    add_device_argument(parser)
    return run_script(parser, argv, evaluate, KEPT)


def compared_with(
    arguments: argparse.Namespace, checkpoints: "Mapping[Path, Checkpoint]"
) -> "Config":
    """Returns the config that names the real images: --config_path, or the first checkpoint's."""
    from pipeline.config import load_config
    from training.ladder import require_no_download

    if arguments.config_path is not None:
        config = load_config(arguments.config_path)
    elif checkpoints:
        config = next(iter(checkpoints.values())).config
    else:
        raise InputError("--checkpoint: give checkpoints, or --images with --config_path")
    if arguments.data_root is not None:
        data = config.data.model_copy(update={"root": str(arguments.data_root)})
        return config.model_copy(update={"data": data})
    if arguments.config_path is None:
        require_no_download(config.data, next(iter(checkpoints)), "--data_root DIR")
    return config


def evaluate(arguments: argparse.Namespace) -> None:
    """Draws all images, then measures them and writes the tables."""
    from evaluation.comparison import draw_all, known_results, measure_all
    from evaluation.features import make_extractor
    from evaluation.gallery import DIGITS, Gallery, read_images, real_images
    from evaluation.jobs import (
        name_of_images,
        plan_jobs,
        require_different_names,
        require_same_data,
        with_engine,
    )
    from evaluation.tables import markdown, summary
    from pipeline.checkpoint import load_checkpoint
    from pipeline.codec import open_codec
    from training.folder import locked, require_no_run
    from utils.processes import World, join_world, take_all_threads

    output = arguments.output
    require_no_run(output)
    with join_world(arguments.device) as world:
        asked = (world.device, arguments.precision, arguments.compile)
        checkpoints = {
            path: with_engine(load_checkpoint(path), *asked) for path in arguments.checkpoint
        }
        config = compared_with(arguments, checkpoints)
        data = config.data
        require_same_data(checkpoints, data)
        jobs = plan_jobs(
            checkpoints,
            arguments.sampler,
            arguments.steps,
            arguments.count,
            arguments.max_calls,
            arguments.guidance,
        )
        require_different_names(checkpoints, arguments.images)
        files = {
            name_of_images(path): read_images(path, data.image_size, data.channels)
            for path in arguments.images
        }
        extract = make_extractor(
            arguments.features or ("digits" if data.name in DIGITS else "inception"), world.device
        )
        gallery = Gallery(output / "images", world, arguments.seed, arguments.batch_size)
        real = real_images(config)
        # Both raise InputError, before hours of drawing.
        for checkpoint in checkpoints.values():
            open_codec(checkpoint.config.codec, world.device)
        with locked(output, world):
            known_results(output, extract, real)
            draw_all(jobs, gallery)
            if not world.leads:
                return
            take_all_threads()
            alone = Gallery(gallery.folder, World(world.device), gallery.seed, gallery.batch_size)
            results = measure_all(jobs, files, extract, real, alone, output)
    say("\n\n".join(["", markdown(results), summary(results)]).rstrip())
    written = [str(output / name) for name in WRITTEN if (output / name).exists()]
    drawn = f"; the images drawn are in {gallery.folder}" if jobs else ""
    say(f"\nwritten: {', '.join(written)}{drawn}")


if __name__ == "__main__":
    sys.exit(main())
