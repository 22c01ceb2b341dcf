import gzip
import multiprocessing
import os
import shutil
import signal
import threading
import time
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from utils.command import InputError
from utils.data import ImageFolder, MemoryDataset, fit, open_dataset, read_mnist
from utils.images import decode, encode

CPU = torch.device("cpu")


def open_here(name="mnist", root="data", image_size=32, channels=1, workers=0):
    return open_dataset(name, str(root), image_size, channels, workers, CPU)


def test_mnist_is_complete_and_padded():
    from pathlib import Path

    images, labels = read_mnist(Path("data/mnist"))
    assert images.shape == (60000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    test_images, test_labels = read_mnist(Path("data/mnist"), "t10k")
    assert test_images.shape == (10000, 28, 28)
    assert test_labels[:3].tolist() == [7, 2, 1]
    dataset = open_here()
    assert (dataset.num_images, dataset.num_classes) == (60000, 10)
    (batch, batch_labels), *rest = dataset.batches([torch.tensor([0, 2]), torch.tensor([1])])
    assert batch.dtype == torch.uint8
    assert torch.equal(batch[:, 0, 2:-2, 2:-2], images[[0, 2]])
    assert not batch[:, :, :2].any()
    assert batch_labels.tolist() == [5, 4]
    assert len(rest) == 1


def test_three_channels_and_other_sizes_come_from_the_config_alone():
    dataset = open_here(channels=3, image_size=16)
    images, _ = next(dataset.batches([torch.arange(4)]))
    assert images.shape == (4, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    colour = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert fit(colour, 32, 1).shape == (2, 1, 32, 32)
    assert torch.equal(fit(colour, 32, 3), colour)


def test_colored_digits_have_a_colour_each():
    dataset = open_here("colored_mnist", channels=3)
    assert (dataset.num_images, dataset.num_classes) == (60000, 10)
    indices = torch.arange(200)
    images, labels = next(dataset.batches([indices]))
    grey, same_labels = next(open_here().batches([indices]))
    assert torch.equal(images.amax(1, keepdim=True), grey)
    assert torch.equal(labels, same_labels)
    of_the_brightest = images.flatten(2).amax(2)  # its colour, (B, 3)
    assert of_the_brightest.unique(dim=0).shape[0] == 200
    assert not of_the_brightest.eq(0).all(0).any(), "every channel is in use"
    again, _ = next(open_here("colored_mnist", channels=3).batches([indices]))
    assert torch.equal(images, again)
    assert next(open_here("colored_mnist").batches([indices]))[0].shape == (200, 1, 32, 32)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "recompressed", "empty"])
def test_a_damaged_mnist_file_is_named(tmp_path, name, damage):
    shutil.copytree("data/mnist", tmp_path / "mnist")
    path = tmp_path / "mnist" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        pixels = bytearray(gzip.decompress(content))
        pixels[1000] ^= 1
        path.write_bytes(gzip.compress(pixels, 1))
    with pytest.raises(InputError, match=str(path)) as caught:
        open_here(root=tmp_path)
    assert "git checkout data/mnist" in str(caught.value)


# --- folders of images ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for n, (name, size) in enumerate(
        {"b/wide": (40, 20), "a/tall": (20, 50), "a/big": (64, 64)}.items()
    ):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        assert n < 3
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images_is_streamed_in_order(folder, channels, workers):
    dataset = open_here("image_folder", folder, 16, channels, workers)
    assert (dataset.num_images, dataset.num_classes) == (3, 2)
    batches = list(dataset.batches([torch.tensor([2, 0]), torch.tensor([1])]))
    assert [images.shape for images, _ in batches] == [(2, channels, 16, 16), (1, channels, 16, 16)]
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].tolist() == [1, 0]  # folders b and a
    again = next(open_here("image_folder", folder, 16, channels, 0).batches([torch.tensor([2, 0])]))
    assert torch.equal(batches[0][0], again[0])


def test_images_are_centre_cropped(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "x.png")
    dataset = ImageFolder(tmp_path, 8, 1)
    assert dataset.num_classes is None
    image, label = dataset[0]
    assert (image == 255).all()
    assert label == -1


def test_sixteen_bits_a_pixel_are_brought_to_eight(tmp_path):
    pixels = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image, _ = ImageFolder(tmp_path, 32, 1)[0]
    assert np.array_equal(image[0].numpy(), pixels >> 8)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "x.tiff")
    assert "8 or 16 bits" in str(ImageFolder(tmp_path, 32, 1)[1])


def test_workers_live_on_when_all_of_the_run_is_told_to_stop(folder):
    """torchrun, timeout and batch systems signal the whole group; the main process then saves."""
    dataset = open_here("image_folder", folder, 16, 3, workers=1)
    batches = dataset.batches(torch.arange(4) % dataset.num_images for _ in range(20))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 19


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(folder, workers):
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG no")
    dataset = open_here("image_folder", folder, 16, 3, workers)
    with pytest.raises(InputError, match=r"a/broken.png: not a readable image"):
        list(dataset.batches([torch.arange(4)]))


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_here("image_folder", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no images below it"):
        open_here("image_folder", tmp_path)


@pytest.mark.parametrize(
    ("name", "cls"),
    [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST"), ("cifar10", "CIFAR10")],
)
def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch, name, cls):
    from torchvision import datasets

    for error in (URLError("no route to host"), EOFError("half an archive")):

        def fails(self, *args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(getattr(datasets, cls), "download", fails)
        with pytest.raises(InputError, match=f"{name} is not in .* could not be downloaded") as e:
            open_here(name, tmp_path)
        assert "data.name: mnist" in str(e.value)


def test_one_process_downloads_at_a_time(tmp_path, monkeypatch):
    from torchvision import datasets

    inside, most = [], []

    class Slow:
        data, targets, classes = np.zeros((3, 32, 32, 3), np.uint8), [0, 1, 2], list("abc")

        def __init__(self, root, train, download):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()

    monkeypatch.setattr(datasets, "CIFAR10", Slow)
    readers = [
        threading.Thread(target=open_here, args=("cifar10", tmp_path, 32, 3)) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert most == [1, 1, 1]


@pytest.mark.parametrize("shape", [(20, 28, 28), (20, 32, 32, 3)])
def test_a_downloaded_set_is_held_in_memory(tmp_path, monkeypatch, shape):
    from torchvision import datasets

    class Fake:
        def __init__(self, root, train, download):
            self.data = np.full(shape, 7, np.uint8)
            self.targets = [n % 10 for n in range(shape[0])]
            self.classes = list("abcdefghij")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    dataset = open_here("cifar10", tmp_path, 32, 3)
    assert isinstance(dataset, MemoryDataset)
    assert dataset.images.shape == (20, 3, 32, 32)
    assert dataset.num_classes == 10


def test_uint8_round_trips():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = encode(every)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(decode(x), every)
    assert torch.equal(decode(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255], dtype=torch.uint8))
