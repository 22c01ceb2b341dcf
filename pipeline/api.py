"""Images from a checkpoint for other programs: no command line, and no setting is changed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from diffusion.gaussian import Denoiser
from pipeline.build import frozen_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.engine import sampling_engine
from pipeline.sampling import SampleRequest, warn_of_other_use
from utils.command import InputError
from utils.processes import World, choose_device


@dataclass(frozen=True)
class Sampler:
    """Draws images from a checkpoint: sampler(64) -> uint8 (64, C, H, W).

    steps: the number of sampling steps; None for the checkpoint's own.
    """

    checkpoint: Checkpoint = field(repr=False)
    denoiser: Denoiser = field(repr=False)
    world: World
    steps: int | None = None

    def __call__(
        self,
        count: int = 64,
        seed: int = 0,
        *,
        labels: int | Sequence[int] | None = None,
        guidance: float = 0.0,
        batch_size: int = 64,
    ) -> Tensor:
        """Returns the first `count` images of the seed, uint8 (count, C, H, W), on the CPU.

        Image n is a function of the seed and n alone, and the same as that of sample.py. labels:
        classes, in turn, for a conditional checkpoint; -1 is no class; None for all classes in
        turn. guidance: the weight of classifier-free guidance. batch_size: images at a time.
        Raises InputError for values that the checkpoint does not take.
        """
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name}: {value}; take at least 1")
        given = [labels] if isinstance(labels, int) else labels
        try:
            request = SampleRequest.of(
                self.checkpoint,
                self.denoiser,
                self.world,
                steps=self.steps,
                seed=seed,
                labels=None if given is None else ",".join(str(int(n)) for n in given),
                guidance=guidance,
                batch_size=batch_size,
            )
        except InputError as error:
            raise _without_dashes(error) from None
        return replace(request, shown=False).draw_all(count)


def load_sampler(
    checkpoint: Path | str, steps: int | None = None, device: str | None = None
) -> Sampler:
    """Returns a Sampler of the checkpoint in a .pt or .safetensors file.

    steps: None for a student's own, or sampling.steps of a base model's config. device: None for a
    GPU if there is one, else the CPU. Raises InputError for a file that is no checkpoint.
    """
    path = Path(checkpoint)
    loaded = load_checkpoint(path)
    try:
        world = World(choose_device(device))
    except InputError as error:
        raise _without_dashes(error) from None
    if steps is not None and steps < 1:
        raise InputError(f"steps: {steps}; take at least 1")
    warn_of_other_use(loaded, steps, None)
    engine = sampling_engine(loaded.config.engine, world.device)
    return Sampler(loaded, frozen_denoiser(loaded, path, world.device, engine), world, steps)


def _without_dashes(error: InputError) -> InputError:
    """The error with an argument's name where it names an option of the command line."""
    return InputError(re.sub(r"(?<!\S)--(?=[a-z])", "", str(error)))


def load_published(
    folder: Path, name: str, steps: int | None = None, device: str | None = None, kind: str = ""
) -> Sampler:
    """Returns a Sampler of the weights that tools/publish.py wrote into the folder.

    steps: those of a student, or more than any student has: the teacher in so many DDIM steps;
    None for the teacher in its own number. kind: what the students' file names have between name
    and steps. Raises InputError that lists the kinds, or the students.
    """
    kinds: dict[str, dict[int, Path]] = {}
    for path in folder.glob(f"{name}-*.safetensors"):
        if found := re.fullmatch(r"(?:(.+)-)?(\d+)-steps?", path.stem.removeprefix(f"{name}-")):
            kinds.setdefault(found[1] or "", {})[int(found[2])] = path
    if not kinds:
        raise InputError(f"{folder}: has no weights named {name}-<steps>-steps.safetensors")
    if kind not in kinds:
        raise InputError(f"kind: {kind!r}; {name} has {', '.join(map(repr, sorted(kinds)))}")
    students = kinds[kind]
    if steps in students:
        return load_sampler(students[steps], device=device)
    if steps is not None and steps <= max(students):
        raise InputError(
            f"steps: {steps}; {name} has students of {', '.join(map(str, sorted(students)))} "
            f"steps; for its teacher take None, or more than {max(students)}"
        )
    own = folder / f"{name}-{kind}-teacher.safetensors"
    teacher = own if own.exists() else folder / f"{name}-teacher.safetensors"
    return load_sampler(teacher, steps, device)
