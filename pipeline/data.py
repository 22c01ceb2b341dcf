"""Data sets: batches of uint8 images (B, C, H, W) with 1 or 3 channels.

Small data sets are kept in memory on the training device, and batches are gathered there: no worker
processes, no per-image Python. Folders of images are streamed by a DataLoader.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.image_folder import ImageFolder, StreamedDataset
from utils.command import InputError
from utils.files import require_regular_file
from utils.randomness import generator

Batch = tuple[Tensor, Tensor]
"""uint8 images (B, C, H, W) and int64 labels (B,), both on the training device."""


class Dataset(Protocol):
    """The interface of a data set."""

    @property
    def num_images(self) -> int:
        """The number of images."""

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None without labels."""

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yields the images and labels for each batch of indices."""


@dataclass(frozen=True)
class MemoryDataset:
    """Images (N, C, H, W) and labels (N,) on the training device."""

    images: Tensor
    labels: Tensor
    num_classes: int | None

    @property
    def num_images(self) -> int:
        """The number of images."""
        return len(self.images)

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Batch]:
        """See Dataset."""
        for indices in index_batches:
            at = indices.to(self.images.device)
            yield self.images[at], self.labels[at]


# --- MNIST, which is part of the repository -----------------------------------------------------

# MD5 of the decompressed IDX files of the MNIST database.
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST_MNIST_FILE = 16 + 60_000 * 28 * 28  # bytes, decompressed


def read_mnist(folder: Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Returns the images (N, 28, 28) uint8 and labels (N,) of a split: train or t10k.

    Raises InputError that names the file if one is missing, truncated or altered (MD5).
    """
    images = _read_idx(folder, f"{split}-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
    labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", header=8)
    return images, labels.long()


def _read_idx(folder: Path, name: str, header: int) -> Tensor:
    path = folder / f"{name}.gz"
    restore = "restore it from the repository (git checkout data/mnist)"
    try:
        require_regular_file(path)
        with gzip.open(path) as file:
            content = file.read(LARGEST_MNIST_FILE + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: missing (data.root); {restore}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or altered ({error}); {restore}") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_FILES[name]:
        raise InputError(f"{path}: altered, its MD5 is not the MNIST file's; {restore}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


def mnist(root: Path, split: str = "train") -> tuple[Tensor, Tensor, int]:
    """Returns images (N, 1, 28, 28), labels (N,) and the number of classes."""
    images, labels = read_mnist(root / "mnist", split)
    return images[:, None], labels, 10


def colored_mnist(root: Path, split: str = "train") -> tuple[Tensor, Tensor, int]:
    """Returns MNIST with each digit in a random colour on black: images (N, 3, 28, 28).

    A colour is uniform in the unit cube, divided by its maximum, so that the maximum over the
    channels is the grey digit. It is a function of the split and the image's index.
    """
    digits, labels, num_classes = mnist(root, split)
    random = torch.rand(len(digits), 3, 1, 1, generator=generator("cpu", "colors", split))
    colors = random / random.amax(1, keepdim=True)
    parts = zip(
        digits.split(4096), colors.split(4096), strict=True
    )  # in parts, to limit the memory of float images
    images = torch.cat([(d * c).round().to(torch.uint8) for d, c in parts])
    return images, labels, num_classes


def inverted_mnist(root: Path, split: str = "train") -> tuple[Tensor, Tensor, int]:
    """Returns MNIST in black on white, padded: images (N, 1, 32, 32)."""
    digits, labels, num_classes = mnist(root, split)
    return 255 - torch.nn.functional.pad(digits, (2, 2, 2, 2)), labels, num_classes


# --- data sets that torchvision downloads -------------------------------------------------------


def _torchvision(class_name: str, folder: str) -> Callable[[Path], tuple[Tensor, Tensor, int]]:
    def read(root: Path) -> tuple[Tensor, Tensor, int]:
        from filelock import FileLock
        from torchvision import datasets

        where = root / folder
        try:
            where.mkdir(parents=True, exist_ok=True)
            with FileLock(where / ".lock"):  # one process downloads, the others wait
                data: Any = getattr(datasets, class_name)(str(where), train=True, download=True)
        except Exception as error:  # errors of networks, archives and incomplete files
            raise InputError(
                f"data.name: {folder} is not in {where} and could not be downloaded "
                f"({str(error)[:120]}); put torchvision's {class_name} files there, or take "
                "data.name: mnist, which comes with the repository"
            ) from None
        images = torch.as_tensor(data.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images, torch.as_tensor(data.targets), len(data.classes)

    return read


# --- by name ------------------------------------------------------------------------------------

InMemory = Callable[[Path], tuple[Tensor, Tensor, int]]
DOWNLOADED: dict[str, InMemory] = {
    "fashion_mnist": _torchvision("FashionMNIST", "fashion_mnist"),
    "kmnist": _torchvision("KMNIST", "kmnist"),
    "cifar10": _torchvision("CIFAR10", "cifar10"),
}
DATASETS: dict[str, InMemory | type[ImageFolder]] = {
    "mnist": mnist,
    "colored_mnist": colored_mnist,
    "inverted_mnist": inverted_mnist,
    **DOWNLOADED,
    "image_folder": ImageFolder,
}


def open_dataset(
    name: str, root: str, image_size: int, channels: int, workers: int, device: torch.device
) -> Dataset:
    """Returns the data set with its images in the given size and channels (see fit).

    Raises InputError that names what is missing or unreadable.
    """
    source = DATASETS[name]
    if isinstance(source, type):
        return StreamedDataset(source(Path(root), image_size, channels), workers, device)
    images, labels, num_classes = source(Path(root))
    images = fit(images, image_size, channels)
    return MemoryDataset(images.to(device), labels.to(device), num_classes)


def fit(images: Tensor, image_size: int, channels: int) -> Tensor:
    """Resizes uint8 images (N, C, H, W) and converts channels; pads 28x28 to 32x32."""
    from torchvision.transforms.v2 import functional as transforms

    if images.shape[1] == 3 and channels == 1:
        images = transforms.rgb_to_grayscale(images)
    if images.shape[-2:] == (28, 28) and image_size == 32:
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    elif images.shape[-2:] != (image_size, image_size):
        parts = images.split(4096)  # in parts, as above
        images = torch.cat([transforms.resize(p, [image_size, image_size]) for p in parts])
    return images.expand(-1, channels, -1, -1).contiguous()
