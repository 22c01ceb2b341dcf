"""The images to measure: drawn from checkpoints and cached, read from files, or real."""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Num, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.grids import uniform_grid
from evaluation.digits import TRAINED_ON
from pipeline.build import build_dataset, image_shape, load_denoiser, pixel_shape
from pipeline.checkpoint import Checkpoint, digest
from pipeline.config import Config
from pipeline.data import colored_mnist, fit, mnist
from pipeline.engine import sampling_engine
from pipeline.image_folder import ImageFolder
from pipeline.network import build_schedule
from pipeline.sampling import SampleRequest
from pipeline.values import TABLE
from utils.command import InputError
from utils.files import atomic_write, require_regular_file
from utils.processes import World
from utils.randomness import generator

CHUNK = 125  # images per file
LEAST_IMAGES = 10  # from elsewhere: evaluation.quality.FEWEST
LARGEST_ARRAY = 2**32  # bytes read from an .npz: more than 300,000 images of 64x64x3
DIGITS = {"mnist": mnist, "colored_mnist": colored_mnist}  # what the classifier can be used on


class Gallery:
    """A folder that caches images drawn from checkpoints.

    Each image is a function of the seed and its index: all checkpoints, samplers and step counts
    start from the same noise. Files of `chunk` images are written whole, and never drawn again.
    Processes share the work. raw: what the model draws, float32, neither clipped nor rounded nor
    decoded; otherwise uint8.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        seed: int,
        batch_size: int,
        chunk: int = CHUNK,
        raw: bool = False,
    ) -> None:
        self.folder, self.world, self.seed = folder, world, seed
        self.batch_size, self.chunk, self.raw = batch_size, chunk, raw

    def key(self, checkpoint: Checkpoint, sampler: str, steps: int, guidance: float = 0.0) -> str:
        """Returns a digest of everything that the images depend on.

        New settings are included only if they differ from their former fixed values, so that
        images which were drawn before the settings existed are still found.
        """
        config, levels = checkpoint.config, checkpoint.levels(steps)
        model, diffusion = (s.model_dump(mode="json") for s in (config.model, config.diffusion))
        if not model["guidance"]:
            del model["guidance"]
        if not diffusion["clip"]:
            del diffusion["clip"]
        if not model.get("input_features", True):
            del model["input_features"]
        if model["name"] == "unet":
            del model["name"]
        precision = sampling_engine(config.engine, self.world.device).precision
        made_by = [[model, diffusion], config.sampling.clip, precision]
        table = diffusion["schedule"] == TABLE
        if table or not torch.equal(levels, uniform_grid(build_schedule(config), steps)):
            made_by.append(levels)
        if config.codec.identity is not None:
            made_by.append(config.codec.identity)
        if self.raw:
            made_by.append("raw")
        if guidance:
            made_by.append({"guidance": guidance})
        return digest([checkpoint.weights, made_by, sampler, steps, self.seed])

    def images(
        self,
        checkpoint: Checkpoint,
        where: Path,
        sampler: str,
        steps: int,
        count: int,
        guidance: float = 0.0,
    ) -> Num[Tensor, "n c h w"]:
        """Returns the first `count` images. where: the checkpoint's file, for errors."""
        key = self.key(checkpoint, sampler, steps, guidance)
        folder = self.folder / f"{where.stem}-{sampler.replace(':', '-')}-{steps}-{key[:12]}"
        parts = [folder / f"{n:05d}.safetensors" for n in range(math.ceil(count / self.chunk))]
        shape_of = image_shape if self.raw else pixel_shape
        shape = (self.chunk, *shape_of(checkpoint.config))
        dtype = torch.float32 if self.raw else torch.uint8
        known = {n: _read(path, shape, dtype) for n, path in enumerate(parts)}
        self.world.wait()  # before anybody writes
        missing = [n for n, images in known.items() if images is None]
        if missing:
            files = {n: parts[n] for n in missing}
            self._draw(checkpoint, where, sampler, steps, guidance, files)
        known |= {n: load_file(parts[n])["images"] for n in missing}
        return torch.cat([known[n] for n in range(len(parts))])[:count]  # type: ignore[misc]

    def _draw(
        self,
        checkpoint: Checkpoint,
        where: Path,
        sampler: str,
        steps: int,
        guidance: float,
        files: dict[int, Path],
    ) -> None:
        request = SampleRequest.of(
            checkpoint,
            load_denoiser(checkpoint, where, self.world.device),
            self.world,
            steps=steps,
            sampler=sampler,
            clip=False if self.raw else None,
            seed=self.seed,
            guidance=guidance,
            batch_size=self.batch_size,
        )
        parts = [range(n * self.chunk, (n + 1) * self.chunk) for n in files]
        title = f"{where.stem}, {sampler}, {steps} steps"
        for part, images in request.shared(parts, self.raw, title=title):
            with atomic_write(files[part.start // self.chunk]) as file:
                file.write(save({"images": images}))
        self.world.wait()


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor | None:
    """Returns the images in a file of the gallery, or None if it is missing or damaged."""
    if not path.exists():
        return None
    require_regular_file(path)
    try:
        images = load_file(path)["images"]
    except (SafetensorError, OSError, KeyError):
        return None
    return images if images.shape == shape and images.dtype == dtype else None


def read_images(path: Path, image_size: int, channels: int) -> UInt8[Tensor, "n c h w"]:
    """Returns the images in a folder, or in arr_0 of an .npz, uint8 (N, H, W, C).

    Shuffled, because some metrics use only the first N images, and a folder may be sorted by class.
    Raises InputError that names the file and what is wrong.
    """
    if path.suffix.lower() != ".npz":
        folder = ImageFolder(path, image_size, channels, "--images")
        images = []
        for n in range(len(folder)):
            item = folder[n]
            if isinstance(item, InputError):
                raise item
            images.append(item[0])
        return _shuffled(path, torch.stack(images))
    try:
        require_regular_file(path)
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("arr_0.npy").file_size
        if size > LARGEST_ARRAY:
            raise InputError(
                f"{path}: arr_0 has {size:,} bytes; at most {LARGEST_ARRAY:,} are read"
            )
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path}: not a readable .npz with an array arr_0") from None
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[3] not in (1, 3) or not len(array):
        raise InputError(
            f"{path}: arr_0 is {array.dtype} {array.shape}; it should be uint8 (N, H, W, 1 or 3)"
        )
    if array.shape[1:] != (image_size, image_size, channels):
        raise InputError(
            f"{path}: arr_0 is {array.shape}; to compare takes (N, {image_size}, {image_size}, "
            f"{channels}), as the real images are"
        )
    return _shuffled(path, torch.from_numpy(array).permute(0, 3, 1, 2))


def _shuffled(path: Path, images: Tensor) -> Tensor:
    if len(images) < LEAST_IMAGES:
        raise InputError(f"{path}: {len(images)} images; to measure takes at least {LEAST_IMAGES}")
    order = torch.randperm(len(images), generator=generator("cpu", "elsewhere"))
    return images[order].contiguous()


@dataclass(frozen=True)
class RealImages:
    """Real images, uint8, of the model's size and channels.

    reference: the images to compare samples with. floor: as many other real images, whose distance
    to the reference is the best a model can reach. training: the model's training images; None if
    the reference is taken from them.
    """

    reference: UInt8[Tensor, "n c h w"]
    floor: UInt8[Tensor, "m c h w"]
    training: UInt8[Tensor, "k c h w"] | None


def real_images(config: Config) -> RealImages:
    """Returns the real images to compare samples with.

    For digits: the 10,000 test images, and as the floor the 10,000 training images that the
    classifier has not seen. For other data: two disjoint sets of up to 10,000 training images.
    Raises InputError for fewer than 100 images.
    """
    data = config.data
    if data.name in DIGITS:
        test, training = (
            fit(DIGITS[data.name](Path(data.root), split)[0], data.image_size, data.channels)
            for split in ("t10k", "train")
        )
        # Shuffled, because some metrics use only the first N images.
        order = torch.randperm(10_000, generator=generator("cpu", "reference"))
        return RealImages(test[order], training[TRAINED_ON:][order], training)
    dataset = build_dataset(config, torch.device("cpu"))
    if dataset.num_images < 100:
        raise InputError(f"{data.root}: {dataset.num_images} images; to compare takes at least 100")
    size = min(10_000, dataset.num_images // 2)
    order = torch.randperm(dataset.num_images, generator=generator("cpu", "reference"))
    # In parts, which fit into the memory that the data's workers share.
    batches = dataset.batches(order[: 2 * size].split(CHUNK))
    images = torch.cat([part for part, _ in batches])
    return RealImages(images[:size], images[size:], None)
