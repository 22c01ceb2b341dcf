import gzip
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train
from pipeline.codec import decode, encode
from pipeline.data import MemoryDataset, fit, open_dataset, read_mnist
from pipeline.image_folder import MOST_PIXELS, ImageFolder
from tests.toys import tiny
from utils.command import DataError, InputError
from utils.randomness import batch_indices

CPU = torch.device("cpu")


def open_here(name="mnist", root="data", image_size=32, channels=1, workers=0):
    return open_dataset(name, str(root), image_size, channels, workers, CPU)


def test_mnist_is_complete_and_padded():
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


def test_inverted_digits_are_black_on_white():
    images, labels = next(open_here("inverted_mnist").batches([torch.arange(20)]))
    digits, same_labels = next(open_here().batches([torch.arange(20)]))
    assert torch.equal(images, 255 - digits)
    assert torch.equal(labels, same_labels)
    assert images[:, :, :2].eq(255).all(), "the frame too"


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "altered", "recompressed", "empty", "endless", "pipe"]
)
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
    elif damage == "endless":
        path.write_bytes(gzip.compress(bytes(2**28), 1))
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        pixels = bytearray(gzip.decompress(content))
        pixels[1000] ^= 1
        path.write_bytes(gzip.compress(pixels, 1))
    with pytest.raises(InputError, match=str(path)) as caught:
        open_here(root=tmp_path)
    assert "git checkout data/mnist" in str(caught.value) or damage == "pipe"


# --- folders of images ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"b/wide": (40, 20), "a/tall": (20, 50), "a/big": (64, 64)}.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
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
    (tmp_path / "x.pgm").write_bytes(b"P5 32 32 65535\n" + pixels.astype(">u2").tobytes())
    image, _ = ImageFolder(tmp_path, 32, 1)[0]
    assert np.array_equal(image[0].numpy(), pixels >> 8)
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by half
    clear = int(pixels[5, 6])
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif, transparency=clear)
    image, _ = ImageFolder(tmp_path, 32, 1)[1]
    assert np.array_equal(image[0].numpy(), (np.where(pixels == clear, 0, pixels) >> 8)[::-1, ::-1])
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "x.tiff")
    assert "8 or 16 bits" in str(ImageFolder(tmp_path, 32, 1)[2])


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
    """At the start by its header, later if it has changed or its pixels cannot be decoded."""
    broken = folder / "a" / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    with pytest.raises(InputError, match=r"a/broken.png: not a readable image"):
        open_here("image_folder", folder, 16, 3, workers)
    broken.write_bytes((folder / "a" / "big.png").read_bytes()[:2000])
    dataset = open_here("image_folder", folder, 16, 3, workers)
    with pytest.raises(DataError, match=r"a/broken.png: not a readable image"):
        list(dataset.batches([torch.arange(4)]))
    broken.unlink()
    with pytest.raises(DataError, match=r"a/broken.png: not a readable image"):
        list(dataset.batches([torch.arange(4)]))


def test_pipes_are_refused_and_hidden_files_skipped(folder, capsys):
    (folder / "a" / "._big.png").write_bytes(b"what macOS leaves beside a file")
    hidden = folder / ".thumbnails"
    hidden.mkdir()
    (hidden / "x.png").write_bytes(b"no image")
    (folder / "a" / "folder.png").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / ".loop").symlink_to(folder)
    assert open_here("image_folder", folder, 16, 3).num_images == 3
    said = capsys.readouterr().err
    assert said.count("loop") == 1
    assert "loop: a link to a folder, which is not followed" in said
    os.mkfifo(folder / "a" / "pipe.png")
    with pytest.raises(InputError, match=r"a/pipe.png: not a regular file"):
        open_here("image_folder", folder, 16, 3)


def resize_then_crop(image, size):
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    "shape", [(40, 20), (20, 50), (64, 64), (33, 47), (300, 211), (28, 28), (32, 500)]
)
@pytest.mark.parametrize("size", [16, 32, 33])
def test_an_image_is_resized_and_then_cropped(tmp_path, shape, size):
    rng = np.random.default_rng(sum(shape))
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    found, _ = ImageFolder(tmp_path, size, 3)[0]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), resize_then_crop(image, size))


def test_a_long_narrow_image_takes_little_memory(tmp_path):
    Image.new("L", (1_000_000, 1), 200).save(tmp_path / "x.png")
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.image_folder import ImageFolder\n"
        "from tests.processes import peak_memory\n"
        "before = peak_memory()\n"
        "image, _ = ImageFolder(Path(sys.argv[1]), 32, 3)[0]\n"
        "assert (image == 200).all()\n"
        "print(peak_memory() - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 10**8


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    Image.new("1", (2**14, MOST_PIXELS // 2**14 + 1)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x.png: 16384 x 4097 pixels are too many"):
        open_here("image_folder", tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_black(tmp_path, mode, recwarn):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 8, 4))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        red = image.getpixel((0, 7))
        image.save(tmp_path / "x.png", transparency=bytes(0 if n == red else 255 for n in range(4)))
    else:
        image.convert(mode).save(tmp_path / "x.png")
    pixels, _ = ImageFolder(tmp_path, 8, 3)[0]
    assert (pixels[:, :4] == 200).all()
    assert (pixels[:, 4:] == 0).all()
    assert not recwarn.list


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what is above comes to the right
    image.save(tmp_path / "x.jpg", quality=100, exif=exif)
    pixels, _ = ImageFolder(tmp_path, 16, 1)[0]
    assert (pixels[0, :, :7] < 30).all()
    assert (pixels[0, :, 9:] > 225).all()


def test_thousands_of_headers_are_looked_at_in_seconds(tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for n in range(2000):
        (tmp_path / f"{n}.png").write_bytes(content)
    (tmp_path / "zz.png").write_text("no image")
    begun = time.process_time()
    with pytest.raises(InputError, match=r"zz.png: not a readable image"):
        open_here("image_folder", tmp_path)
    assert time.process_time() - begun < 5  # a hundred times what it takes


# --- workers ------------------------------------------------------------------------------------


def many(folder, workers=1):
    dataset = open_here("image_folder", folder, 16, 3, workers)
    return dataset.batches(torch.arange(4) % dataset.num_images for _ in range(50))


def test_a_killed_worker_is_named_between_two_batches(folder):
    batches = many(folder)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data.workers: .* ended unexpectedly, perhaps killed"):
        list(batches)
    assert not multiprocessing.active_children()


def test_too_few_open_files_are_one_line(folder):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "import torch; from pipeline.data import open_dataset\n"
        "from utils.command import InputError\n"
        "d = open_dataset('image_folder', sys.argv[1], 16, 3, 2, torch.device('cpu'))\n"
        "try: next(d.batches([torch.arange(2)]))\n"
        "except InputError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert out.stdout.startswith("data.workers: 2 need 96 open files, but the limit is 60"), out


HANGING = """
import os, signal, sys, torch
from pipeline.data import open_dataset
from utils.command import DataError, stop_requests
from pipeline.image_folder import ImageFolder

def hang(self, index):
    print(os.getpid(), flush=True)
    signal.pause()

d = open_dataset("image_folder", sys.argv[1], 16, 3, 1, torch.device("cpu"))
ImageFolder.__getitem__ = hang
import utils.command
utils.command.STALLED = 1
with stop_requests() as stop:
    try:
        next(stop.between(d.batches([torch.arange(2)])))
    except DataError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_run_whatever_it_does(folder, sent):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, folder], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    process.send_signal(sent)
    said, _ = process.communicate(timeout=30)
    if sent != signal.SIGKILL:
        assert process.returncode == 0
        assert "no image was read in 1 seconds" in said
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = (Path("/proc") / str(worker) / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker is alive")


def test_a_file_that_breaks_in_mid_run_costs_no_update(folder, tmp_path_factory, capsys):
    """The updates done are saved, the run says which file it is, and then goes on from there."""
    output = tmp_path_factory.mktemp("run")
    config = output / "tiny.yaml"
    values = tiny(
        data={"name": "image_folder", "root": str(folder), "channels": 3, "workers": 1},
        training={"checkpoint_every": 1000, "updates": 40, "batch_size": 1},
    )
    config.write_text(yaml.safe_dump(values))
    drawn_third = sorted(folder.glob("?/*.png"))[int(batch_indices(3, 1, 0, 0, 2))]
    good = drawn_third.read_bytes()
    drawn_third.write_bytes(good[:-300])  # its header is whole
    command = ["--config_path", str(config), "--output", str(output / "run"), "--device", "cpu"]
    codes = [train.main(command)]
    said = capsys.readouterr().err
    assert f"{drawn_third}: not a readable image" in said
    saved = re.search(r"saved at update (\d+) of 40", said)
    assert (output / "run" / f"diffusion-{saved[1]}.pt").exists()
    drawn_third.write_bytes(good)
    codes.append(train.main(command))
    assert codes == [2, 0]
    assert (output / "run" / "diffusion-40.pt").exists()
    assert "going on from" in capsys.readouterr().out


SLOW_TO_SEE_THE_END = """
import gc, multiprocessing.synchronize, sys, time, torch
from pipeline.data import open_dataset
from utils.command import DataError

def slowly(event):
    with event._cond:
        time.sleep(0.5)
        return not event._flag._semlock._is_zero()

multiprocessing.synchronize.Event.is_set = slowly
d = open_dataset("image_folder", sys.argv[1], 16, 3, 1, torch.device("cpu"))
broken = d.files.files[0]
broken.write_bytes(broken.read_bytes()[:-300])
try:
    list(d.batches(torch.arange(1) for _ in range(9)))
except DataError as error:
    print(error, flush=True)
gc.collect()
print("collected", flush=True)
"""


def test_a_run_ends_though_its_worker_is_holding_a_lock(folder):
    """Killed while it looks whether it is to end, a worker would block its run for ever."""
    command = [sys.executable, "-c", SLOW_TO_SEE_THE_END, folder]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said = out.stdout.splitlines()
    assert "not a readable image" in said[0]
    assert said[1] == "collected", "torch has ended the workers"


LEFT_OPEN = """
import sys, torch
from pipeline.data import open_dataset

d = open_dataset("image_folder", sys.argv[1], 16, 3, int(sys.argv[2]), torch.device("cpu"))
batches = d.batches(torch.arange(1) for _ in range(9))
next(batches)
raise RuntimeError("another fault")
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_ends_though_its_batches_are_left_open(folder, workers):
    """As by an error that keeps the frame of its loop alive until Python exits."""
    command = [sys.executable, "-c", LEFT_OPEN, folder, workers]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1] == "RuntimeError: another fault"


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

    data = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    class Fake:
        def __init__(self, root, train, download):
            self.data = data
            self.targets = [n % 10 for n in range(shape[0])]
            self.classes = list("abcdefghij")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    dataset = open_here("cifar10", tmp_path, 32, 3)
    assert isinstance(dataset, MemoryDataset)
    assert dataset.images.shape == (20, 3, 32, 32)
    assert dataset.labels.tolist() == [n % 10 for n in range(20)]
    assert dataset.num_classes == 10
    if len(shape) == 4:  # of the size asked for, so as it is, but for the order of its axes
        for row, column, channel in ((0, 0, 0), (2, 30, 1), (17, 4, 2)):
            pixel = dataset.images[5, channel, row, column]
            assert pixel == data[5, row, column, channel]


def test_uint8_round_trips():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = encode(every)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(decode(x), every)
    assert torch.equal(decode(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255], dtype=torch.uint8))


@pytest.mark.parametrize(
    "content",
    [torch.zeros(125, 1, 16, 16, dtype=torch.uint8), torch.zeros(125, 1, 32, 32), None],
    ids=["size", "type", "damaged"],
)
def test_a_file_of_other_images_in_the_gallery_is_drawn_again(tmp_path, content):
    from safetensors.torch import save_file

    from evaluation.gallery import _read

    path = tmp_path / "00000.safetensors"
    if content is None:
        path.write_bytes(b"no tensors")
    else:
        save_file({"images": content}, path)
    assert _read(path, (125, 1, 32, 32)) is None
    images = torch.full((125, 1, 32, 32), 3, dtype=torch.uint8)
    save_file({"images": images}, path)
    assert torch.equal(_read(path, (125, 1, 32, 32)), images)
