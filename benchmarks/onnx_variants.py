"""What an ONNX file loses and costs by precision: python -m benchmarks.onnx_variants.

Exports a student in each precision, draws the same noise with each in ONNX Runtime and with
PyTorch, and prints size, time, Frechet distance and the pixels that differ from PyTorch's.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from evaluation.features import make_extractor
from evaluation.gallery import DIGITS, real_images
from evaluation.quality import measure
from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.sampling import SampleRequest
from tools import export_onnx
from tools.onnx_file import read_onnx
from utils.command import (
    INTERRUPTED,
    InputError,
    Stopped,
    path_name,
    run_script,
    say,
    whole_number,
)
from utils.processes import World
from utils.progress import progress_bar
from utils.randomness import ImageNoise

BATCH = 50
HEADER = (
    "| run by | file, MB | ms an image | Frechet distance | pixels that differ from PyTorch's "
    "| by more than one level |\n|---|---:|---:|---:|---:|---:|"
)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    student = Path("pretrained/mnist-8-steps.safetensors")
    add("--checkpoint", type=path_name, default=student, metavar="FILE")
    add("--count", type=whole_number(20, 10**6), default=2000, metavar="N", help="images (2000)")
    return run_script(parser, argv, compare)


def compare(arguments: argparse.Namespace) -> None:
    """Draws with PyTorch and with each file, and prints the table."""
    path, count = arguments.checkpoint, arguments.count
    checkpoint = load_checkpoint(path)
    if checkpoint.config.data.name not in DIGITS:
        raise InputError(f"{path}: of {checkpoint.config.data.name}; digits are compared here")
    if checkpoint.config.model.num_classes is not None:
        raise InputError(f"{path}: takes classes; models without are compared here")
    extract = make_extractor("digits", torch.device("cpu"))
    real = extract(real_images(checkpoint.config).reference, "features of real images")
    wanted, seconds = by_pytorch(checkpoint, path, count)
    rows = []

    def add(name: str, size: float | None, images: Tensor, seconds: float) -> None:
        quality = measure(extract(images), real)
        differs = (images.int() - wanted.int()).abs()
        shares = [(differs > level).float().mean().item() for level in (0, 1)]
        cells = [name, "" if size is None else f"{size / 1e6:.1f}", f"{1000 * seconds:.2f}"]
        cells += [f"{quality.frechet:.3f} ± {quality.frechet_interval:.3f}"]
        rows.append(f"| {' | '.join([*cells, *(f'{100 * share:.2f}%' for share in shares)])} |")

    add("PyTorch", None, wanted, seconds)
    with tempfile.TemporaryDirectory() as folder:
        for precision in export_onnx.PRECISIONS:
            file = Path(folder, f"{precision}.onnx")
            command = [str(path), "--output", str(file), "--precision", precision]
            if (code := export_onnx.main(command)) == INTERRUPTED:
                raise Stopped
            if code:
                raise InputError(f"{path}: not exported in {precision}")
            images, seconds = by_onnx(checkpoint, file, count)
            add(f"ONNX Runtime, {precision}", file.stat().st_size, images, seconds)
    threads = torch.get_num_threads()
    say(f"{path}: {count:,} images, {BATCH} at a time, {threads} threads\n")
    say("\n".join([HEADER, *rows]))


def by_pytorch(checkpoint: Checkpoint, path: Path, count: int) -> tuple[Tensor, float]:
    """Returns images, uint8 (N, C, H, W), and the seconds for each."""
    world = World(torch.device("cpu"))
    denoiser = load_denoiser(checkpoint, path, world.device)
    request = SampleRequest.of(checkpoint, denoiser, world, seed=0, batch_size=BATCH)
    begun = time.perf_counter()
    images = request.draw_all(count, bar=True)
    return images, (time.perf_counter() - begun) / count


def by_onnx(checkpoint: Checkpoint, file: Path, count: int) -> tuple[Tensor, float]:
    """Returns what the file draws from the same noise, and the seconds for each image."""
    model = read_onnx(file, torch.get_num_threads())
    made, taken, cpu = [], 0.0, torch.device("cpu")
    with progress_bar(count, file.stem, "image") as bar:
        for start in range(0, count, BATCH):
            indices = range(start, min(count, start + BATCH))
            noise = ImageNoise(0, indices, image_shape(checkpoint.config), cpu).draw()
            begun = time.perf_counter()
            (images,) = model(noise=noise)
            taken += time.perf_counter() - begun
            made.append(images)
            bar.update(len(indices))
    return torch.cat(made), taken / count


if __name__ == "__main__":
    sys.exit(main())
