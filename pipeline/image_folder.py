"""A folder of images as a data set, checked when opened and streamed by worker processes."""

import atexit
import ctypes
import multiprocessing
import os
import resource
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
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

from utils.command import STOP_SIGNALS, DataError, InputError, warn

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MOST_PIXELS = 2**26  # in one image: 256 MiB with four channels
LONGEST = 16  # times the shorter side: longer images are cropped before resizing
READERS = 8  # threads that read the headers


class ImageFolder(torch.utils.data.Dataset[Any]):
    """All images below a folder, resized and centre-cropped. Its subfolders are the classes.

    If the folder itself contains images there are no classes, and every label is -1. Hidden files
    and folders are skipped. Transparent pixels are blended with black, and the EXIF orientation is
    applied. Raises InputError that names the first file that is not an image.

    given_as: where the user named the folder.
    """

    def __init__(
        self,
        root: Path,
        image_size: int,
        channels: int,
        given_as: str = "data.root of an image_folder",
    ) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder ({given_as})")
        found = [(path, path.relative_to(root).parts) for path in sorted(root.rglob("*"))]
        named = [
            (path, parts)
            for path, parts in found
            if path.suffix.lower() in IMAGE_SUFFIXES and not _hidden(parts) and not path.is_dir()
        ]
        for path, parts in found:
            if path.is_symlink() and path.is_dir() and not _hidden(parts):
                warn(
                    f"{path}: a link to a folder, which is not followed; link the images themselves"
                )
        if not named:
            raise InputError(f"{root}: no images below it ({given_as})")
        self.files = [path for path, _ in named]
        with ThreadPoolExecutor(READERS) as pool:
            for error in pool.map(_header_error, self.files):
                if error is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise error
        in_classes = all(len(parts) > 1 for _, parts in named)
        names = sorted({parts[0] for _, parts in named}) if in_classes else []
        numbers = {name: n for n, name in enumerate(names)}
        self.labels = [numbers.get(parts[0], -1) for _, parts in named]
        self.num_classes = len(names) or None
        self.image_size, self.mode = image_size, {1: "L", 3: "RGB"}[channels]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        """Returns image and label, or an error, which would lose its type if raised in a worker."""
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
        if (error := _header_error(path)) is not None:  # the file may have changed
            raise error
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return np.asarray(self._fitted(_on_black(_eight_bits(_upright(image)), self.mode)))

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Resizes the shorter side to image_size and crops the longer one to its middle.

        A very long image is cropped first, to limit the memory of resizing.
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


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def _header_error(path: Path) -> DataError | None:
    """Returns what is wrong with an image file according to its header, or None."""
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
    """Scales 16 bits a pixel to 8, which Pillow would clip; a transparent grey becomes black.

    Raises ValueError for other depths.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)
        values = np.where(values == image.info.get("transparency", -1), 0, values)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 or 16 bits a channel")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, if there is one that can be read."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # a copy would not know its format
    return image


def _on_black(image: Image.Image, mode: str) -> Image.Image:
    """Converts the image to the mode, with transparent pixels blended with black."""
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
        """The number of images."""
        return len(self.files)

    @property
    def num_classes(self) -> int | None:
        """The number of subfolders; None if the folder itself contains images."""
        return self.files.num_classes

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See Dataset. Raises DataError for an unreadable file or a worker that died."""
        _require_file_descriptors(self.workers)
        loader = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=(indices.tolist() for indices in index_batches),  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=partial(_begin_worker, os.getpid()),
            # Python 3.14 would fork a server's, and they are to end when this process does.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )
        others = set(multiprocessing.active_children())
        batches, finished = None, False

        def kill() -> None:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # it may hang in a read, and ignores other signals

        # Python waits for all workers when it exits, and this may not have been closed by then.
        atexit.register(kill)
        try:
            batches = iter(loader)
            # torch reports a dead worker from a signal handler, which may interrupt anything.
            # Without the handler the loader notices between two batches.
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
            if not finished and self.workers and not sys.is_finalizing():
                _end(batches, kill)
            atexit.unregister(kill)


def _end(batches: Any, kill: Callable[[], None]) -> None:
    """Ends the workers as torch does, then kills those that are left after a second.

    A worker that is killed may hold the lock of the event by which torch tells workers to end, and
    torch would wait for that lock for ever. So they are told before any is killed, and in a thread,
    as one may have been killed by the system before.
    """
    told = threading.Thread(target=getattr(batches, "_shutdown_workers", None), daemon=True)
    try:
        told.start()
        told.join(1)
    finally:
        kill()
    told.join(1)


def _next(batches: Iterator[Any], workers: int) -> Any:
    """Returns the next batch, None after the last. Raises DataError if a worker died."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers:
            raise
        raise DataError(
            "data.workers: a process that reads images ended unexpectedly, perhaps killed for lack "
            f"of memory ({(str(error) or type(error).__name__).splitlines()[0]}); take fewer, or 0"
        ) from None


def _require_file_descriptors(workers: int) -> None:
    """Raises the limit of open files if needed, or InputError if that is not allowed."""
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
    """Makes a worker ignore the signals to stop, and end when its parent does."""
    for number in STOP_SIGNALS:  # they are sent to the whole process group
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
