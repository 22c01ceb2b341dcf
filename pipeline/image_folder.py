"""Any folder of images as a data set: checked when it is opened, streamed by worker processes."""

import ctypes
import multiprocessing
import os
import resource
import signal
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.command import STOP_SIGNALS, DataError, InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MOST_PIXELS = 2**26  # of one image: 256 MiB where it has four channels
LONGEST = 16  # times the shorter side: of longer images only the middle is resized
READERS = 8  # threads that look at the headers, which waits for the disk


class ImageFolder(torch.utils.data.Dataset[Any]):
    """Every image below a folder, resized and centre-cropped; its folders are the classes.

    If images lie in the folder itself there are no classes, and every label is -1. Hidden files and
    folders are skipped. Transparent pixels are blended with black; a photo is turned as its EXIF
    orientation says. Raises InputError that names the first file that is not an image.
    """

    def __init__(self, root: Path, image_size: int, channels: int) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder (data.root of an image_folder)")
        found = [(path, path.relative_to(root).parts) for path in sorted(root.rglob("*"))]
        named = [
            (path, parts)
            for path, parts in found
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in parts)
            and not path.is_dir()
        ]
        if not named:
            raise InputError(f"{root}: no images below it (data.root of an image_folder)")
        self.files = [path for path, _ in named]
        with ThreadPoolExecutor(READERS) as pool:
            for error in pool.map(_header_error, self.files):
                if error is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise error
        in_classes = all(len(parts) > 1 for _, parts in named)
        names = sorted({parts[0] for _, parts in named}) if in_classes else []
        self.labels = [names.index(parts[0]) if names else -1 for _, parts in named]
        self.num_classes = len(names) or None
        self.image_size, self.mode = image_size, {1: "L", 3: "RGB"}[channels]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        """The image, or the error that names it: an exception would lose its type in a worker."""
        path = self.files[index]
        try:
            pixels = self._pixels(path)
        except Exception as error:  # a decoder may raise anything
            return DataError(f"{path}: not a readable image ({error})")
        channels_last = torch.from_numpy(pixels.copy()).reshape(
            self.image_size, self.image_size, -1
        )
        return channels_last.permute(2, 0, 1).contiguous(), self.labels[index]

    def _pixels(self, path: Path) -> np.ndarray[Any, Any]:
        if (error := _header_error(path)) is not None:  # it may have changed since
            raise error
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return np.asarray(self._fitted(_on_black(_upright(_eight_bits(image)), self.mode)))

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The shorter side resized to image_size, the middle of the longer one kept.

        A very long image is cut to its middle before, so that it takes no more memory.
        """
        size, shorter = self.image_size, min(image.size)
        if max(image.size) > LONGEST * shorter:
            margins = [max(0, side - LONGEST * shorter) // 2 for side in image.size]
            ends = [side - margin for side, margin in zip(image.size, margins, strict=True)]
            image = image.crop((*margins, *ends))  # type: ignore[arg-type]
        scale = size / shorter
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))


def _header_error(path: Path) -> DataError | None:
    """What is wrong with an image file, as far as its header tells; None if nothing is."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return DataError(f"{path}: not a regular file; pipes, sockets and devices are not read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
    except Exception as error:  # a decoder may raise anything
        return DataError(f"{path}: not a readable image ({error})")
    if width * height > MOST_PIXELS:
        return DataError(
            f"{path}: {width} x {height} pixels are too many; at most {MOST_PIXELS:,} are read"
        )
    return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a pixel brought to 8, as Pillow would saturate them; deeper images are refused."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 or 16 bits a channel")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, if it has one that can be read."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _on_black(image: Image.Image, mode: str) -> Image.Image:
    """The image in the mode asked for, its transparent pixels blended with black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


@dataclass(frozen=True)
class StreamedDataset:
    """Images read from files by worker processes while the device computes."""

    files: ImageFolder
    workers: int
    device: torch.device

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return len(self.files)

    @property
    def num_classes(self) -> int | None:
        """How many folders of the first level there are."""
        return self.files.num_classes

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See Dataset. Raises DataError for a file that cannot be read, or a worker that died."""
        _require_file_descriptors(self.workers)
        loader = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=(indices.tolist() for indices in index_batches),  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
        others = set(multiprocessing.active_children())
        finished = False
        try:
            batches = iter(loader)
            # torch reports a dead worker from a signal handler, wherever the main thread is just
            # then; without it the loader finds out itself, between two batches.
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            while (batch := _next(batches, self.workers)) is not None:
                if isinstance(batch, DataError):
                    raise batch
                images, labels = batch
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
            finished = True
        finally:
            for worker in set(multiprocessing.active_children()) - others if not finished else ():
                worker.kill()  # it may hang in a read, and ignores softer signals


def _next(batches: Iterator[Any], workers: int) -> Any:
    """The loader's next batch, None after the last. Raises DataError for a worker that died."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers:
            raise
        raise DataError(
            "data.workers: a process that reads images ended unexpectedly, perhaps killed for lack "
            f"of memory ({str(error).splitlines()[0]}); take fewer workers, or 0"
        ) from None


def _require_file_descriptors(workers: int) -> None:
    """Raises InputError where the system allows too few open files; asks it for more first."""
    needed = 64 + 16 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers and soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InputError(
                f"data.workers: {workers} need {needed} open files, but the limit is {hard}; raise "
                f"it (ulimit -n {needed}), or take data.workers=0"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _collate(items: list[Any]) -> Any:
    error = next((item for item in items if isinstance(item, DataError)), None)
    if error is not None:
        return error
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def _begin_worker(parent: int, worker: int) -> None:
    """Leaves signals to stop to the process that saves, and ends with that process."""
    for number in STOP_SIGNALS:  # they reach all of its group
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
