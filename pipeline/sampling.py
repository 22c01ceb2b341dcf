"""Draws images from a checkpoint: noise, condition, sampler, batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.gaussian import Denoise, Denoiser, Prediction, clipped, conditioned, guided
from diffusion.grids import Grid
from diffusion.samplers import OnStep, make_sampler
from diffusion.schedule import on_device
from pipeline.build import image_shape, pixel_shape
from pipeline.checkpoint import Checkpoint
from pipeline.codec import PIXELS, Codec, open_codec
from pipeline.codec_sections import NOT_CLIPPED
from pipeline.config import Config
from utils.command import InputError, warn
from utils.processes import World
from utils.progress import progress_bar
from utils.randomness import ImageNoise


@dataclass(frozen=True)
class SampleRequest:
    """How to draw images: everything but which ones.

    levels: the grid, on the CPU. classes: image n gets class n mod len(classes); None without
    classes. guidance: the weight of classifier-free guidance. shown: whether to show progress bars.
    """

    config: Config
    denoiser: Denoiser
    world: World
    levels: Grid
    sampler: str
    clip: bool
    seed: int
    classes: Sequence[int] | None
    guidance: float = 0.0
    batch_size: int = 64
    shown: bool = True
    codec: Codec = PIXELS

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        denoiser: Denoiser,
        world: World,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        clip: bool | None = None,
        seed: int | None = None,
        labels: str | None = None,
        guidance: float = 0.0,
        batch_size: int = 64,
    ) -> "SampleRequest":
        """Returns a request with the checkpoint's own settings for all that is not given.

        Raises InputError for invalid values; warns of a guidance weight that is new to the model.
        """
        sampling = checkpoint.config.sampling
        if sampler is None:
            sampler = checkpoint.sampler or sampling.sampler
        require_sampler(sampler)
        if clip and checkpoint.config.codec.identity is not None:
            raise InputError(f"--clip: {NOT_CLIPPED}")
        classes = _parse_labels(labels, checkpoint.config.model.num_classes)
        require_guidable(guidance, checkpoint)
        return cls(
            config=checkpoint.config,
            denoiser=denoiser,
            world=world,
            levels=checkpoint.levels(steps),
            sampler=sampler,
            clip=sampling.clip if clip is None else clip,
            seed=checkpoint.config.seed if seed is None else seed,
            classes=classes,
            guidance=guidance,
            batch_size=batch_size,
            codec=open_codec(checkpoint.config.codec, world.device),
        )

    @property
    def num_steps(self) -> int:
        """The number of sampling steps."""
        return len(self.levels) - 1

    def denoise(self, indices: Sequence[int]) -> Denoise:
        """Returns the denoiser for these images, with classes, guidance and clipping."""
        device, condition = self.world.device, {}
        if self.classes is not None:
            labels = [self.classes[index % len(self.classes)] for index in indices]
            condition["label"] = torch.tensor(labels, device=device)
        takes_guidance = self.config.model.guidance  # as a student of guided teachers does
        if takes_guidance or self.guidance:
            condition["guidance"] = torch.full((len(indices),), self.guidance, device=device)
        guides = self.guidance and not takes_guidance
        asked = guided(self.denoiser, self.denoiser.clip) if guides else self.denoiser
        denoise = conditioned(asked, **condition)
        return clipped(denoise) if self.clip else denoise

    def sample(self, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Returns what the model draws for these indices: float, (B, C, H, W) of image_shape.

        Each is a function of the seed and its index alone, apart from rounding.
        """
        device = self.world.device
        noise = ImageNoise(self.seed, indices, image_shape(self.config), device)
        steps = self.num_steps
        with progress_bar(steps, "sampling", "step", leave=False, shown=self.shown) as bar:

            def step(i: int, z: Tensor, prediction: Prediction) -> None:
                bar.update()
                if on_step is not None:
                    on_step(i, z, prediction)

            return make_sampler(self.sampler)(
                self.denoise(indices),
                noise.draw(),
                on_device(self.levels, device),
                draw_noise=noise.draw,
                on_step=step,
            )

    def draw(self, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Returns the uint8 images of these indices, on the CPU."""
        return self.codec.decode(self.sample(indices, on_step)).cpu().contiguous()

    def draw_all(self, count: int, bar: bool = False) -> Tensor:
        """Returns the first `count` images, uint8. The processes share the work; each gets all."""
        images = torch.zeros(count, *pixel_shape(self.config), dtype=torch.uint8)
        for indices, drawn in self.batches(count, bar):
            images[indices.start : indices.stop] = drawn
        if self.world.size == 1:
            return images
        return self.world.sum(images.to(self.world.device)).cpu()

    def batches(self, count: int, bar: bool = True) -> Iterator[tuple[range, Tensor]]:
        """Yields this process's share of the first `count` images, a batch at a time."""
        size = min(self.batch_size, math.ceil(count / self.world.size))
        parts = [range(start, min(count, start + size)) for start in range(0, count, size)]
        return self.shared(parts, bar=bar)

    def shared(
        self, parts: Sequence[range], raw: bool = False, title: str | None = None, bar: bool = True
    ) -> Iterator[tuple[range, Tensor]]:
        """Draws this process's share of the parts, and yields each with its indices.

        raw: as floats (see sample), otherwise uint8.
        """
        rank, size, draw = self.world.rank, self.world.size, self.sample if raw else self.draw
        total = sum(len(part) for part in parts)
        with progress_bar(
            total, title or "images", "image", leave=title is None, shown=bar and self.shown
        ) as done:
            for n in range(rank, len(parts), size):
                starts = range(parts[n].start, parts[n].stop, self.batch_size)
                batches = [range(s, min(s + self.batch_size, parts[n].stop)) for s in starts]
                yield parts[n], torch.cat([draw(batch).cpu() for batch in batches]).contiguous()
                done.update(sum(len(part) for part in parts[n - rank : n - rank + size]))


def require_sampler(name: str) -> None:
    """Raises InputError unless there is a sampler of that name."""
    try:
        make_sampler(name)
    except ValueError as error:
        raise InputError(f"--sampler: {error}") from None


def require_guidable(weight: float, checkpoint: Checkpoint) -> None:
    """Raises InputError if the checkpoint cannot be guided; warns of weights it has not learnt."""
    config = checkpoint.config
    if not weight and not config.model.guidance:
        return
    if not 0.0 <= weight <= 1000.0:  # not NaN either
        raise InputError(f"--guidance {weight}: take a number from 0 to 1000")
    if config.model.num_classes is None:
        raise InputError(
            f"--guidance {weight}: this checkpoint knows no classes; leave --guidance out"
        )
    trained = config.distillation.guidance if config.model.guidance else None
    if trained is not None and not trained[0] <= weight <= trained[1]:
        warn(f"--guidance {weight:g}: this student was distilled for {trained[0]} to {trained[1]}")
    elif checkpoint.num_steps and not config.model.guidance:
        raise InputError(
            f"--guidance {weight}: this student does not take a guidance weight, and never saw "
            "images without their class; distil one with distillation.guidance"
        )
    elif not checkpoint.num_steps and not config.training.label_dropout:
        warn(
            "this model was never shown images without their class (training.label_dropout), so "
            "guidance asks it for what it has not learnt"
        )


def warn_of_other_use(checkpoint: Checkpoint, steps: int | None, sampler: str | None) -> None:
    """Warns of steps and a sampler that were asked for, but that a student was not made for."""
    own = checkpoint.num_steps
    if own and steps not in (None, own) and checkpoint.sampler == "ddim":
        warn(
            f"this student was distilled for {own} steps: it learnt to jump between those "
            f"noise levels alone, so {steps} steps ask it for jumps it has never seen"
        )
    if own and sampler not in (None, checkpoint.sampler):
        warn(
            f"this student was distilled for the sampler {checkpoint.sampler}; {sampler} asks "
            "for the mean of the images at each level, of which a student keeps one, and looks "
            "blurred or noisy"
        )


def _parse_labels(text: str | None, num_classes: int | None) -> Sequence[int] | None:
    if text is None:
        return None if num_classes is None else range(num_classes)
    if num_classes is None:
        raise InputError(f"--labels {text}: this checkpoint knows no classes; leave --labels out")
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--labels {text}: not whole numbers with commas, e.g. 0,1,2") from None
    if not all(-1 <= label < num_classes for label in labels):
        raise InputError(f"--labels {text}: classes go from 0 to {num_classes - 1}; -1 is none")
    return labels
