"""Self-describing checkpoints: loading runs no code, and a file is written whole or not at all."""

import json
import math
import pickletools
import warnings
import zipfile
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion.grids import Grid, uniform_grid
from pipeline.checkpoint_checks import (
    State,
    as_grid,
    as_name,
    as_scaler,
    as_state,
    named_tensors,
    read_safetensors,
    reading,
    require_finite,
)
from pipeline.checkpoint_checks import digest as digest
from pipeline.config import Config, explain, make_config
from pipeline.network import build_schedule, misfit, uniform_levels
from pipeline.values import TABLE, SamplerName
from utils.command import DamagedCheckpoint, InputError
from utils.files import atomic_write, require_regular_file

FORMAT = "progressive-distillation"
FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 had num_steps instead of grid and sampler
HALF = (torch.float16, torch.bfloat16)

CheckedState = Annotated[State, PlainValidator(as_state)]
Short = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Checkpoint:
    """A network with everything needed to sample from it and to continue its training.

    kind: base, student, or autoencoder (one in training). name: the name of its config. update,
    stage: how far it was trained. grid: the noise levels that a student was distilled for, as
    logsnr from t = 1 down to +inf; sampler: the sampler to use on them; both None otherwise, unless
    diffusion.schedule is table: then a base model's grid has all levels that it was trained at.
    model: the weights in training; ema: their average; walker: the average that walks the paths of
    the distillation; critic: the weights of the critic of an adversarial loss; None if not kept.
    optimizer: its state, None in published files; scaler: the
    state of the loss scaler in fp16. lineage: digests of the weights that training started from: a
    student's teacher (teacher), and the file of --initialise (initial).

    Raises pydantic.ValidationError for invalid entries.
    """

    kind: Literal["base", "student", "autoencoder"]
    name: Annotated[str, AfterValidator(as_name)]
    config: Config
    update: Annotated[int, Field(ge=0, le=2**31)]
    stage: Annotated[int, Field(ge=0, le=2**10)]
    model: CheckedState
    grid: Annotated[tuple[float, ...], AfterValidator(as_grid), Field(max_length=2**20)] | None = (
        None
    )
    sampler: SamplerName | None = None
    ema: CheckedState | None = None
    walker: CheckedState | None = None
    critic: CheckedState | None = None
    optimizer: dict[str, Any] | None = None
    scaler: Annotated[dict[str, Any], PlainValidator(as_scaler)] = field(default_factory=dict)
    lineage: Annotated[dict[Short, Short], Field(max_length=8)] = field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Checkpoint":
        if self.config.codec.name != "pixels" and self.config.codec.digest is None:
            raise ValueError("config: codec.digest: missing; the autoencoder must be named by it")
        base, table = self.kind != "student", self.config.diffusion.schedule == TABLE
        if table and self.grid is None:
            raise ValueError(f"grid: missing, where diffusion.schedule is {TABLE}")
        steps = None if self.grid is None else len(self.grid) - 1
        no_steps = steps is None or (base and table)
        if not base == no_steps == (self.sampler is None) == (self.stage == 0):
            raise ValueError(
                f"kind: {self.kind}, but stage is {self.stage}, num_steps {steps} and "
                f"sampler {self.sampler}; a base model has stage 0 and neither of the others"
            )
        return self

    @property
    def num_steps(self) -> int | None:
        """The number of sampling steps a student was distilled for; None for a base model."""
        return None if self.grid is None or self.kind == "base" else len(self.grid) - 1

    def levels(self, num_steps: int | None = None) -> Grid:
        """Returns the grid to sample on: a student's own, or a uniform one of num_steps steps.

        Raises InputError for more steps than a table has levels.
        """
        steps = num_steps or self.num_steps or self.config.sampling.steps
        if self.grid is not None and steps == self.num_steps:
            return torch.tensor(self.grid, dtype=torch.float64)
        return uniform_levels(self.config, self.grid, steps)

    @property
    def own_steps(self) -> int | None:
        """The only number of steps that a student was made for; None if there are others.

        A base model is sampled in any number of steps, and a student by consistency distillation
        too, unless its levels are a table, of which it keeps its own alone.
        """
        free = self.sampler == "consistency" and self.config.diffusion.schedule != TABLE
        return None if free else self.num_steps

    @property
    def weights(self) -> State:
        """The weights to sample from or to distil: the average if there is one."""
        return self.model if self.ema is None else self.ema


# --- files ----------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, or leaves the existing file as it was.

    Raises InputError if a weight is not finite, since load_checkpoint would refuse the file.
    """
    content = _entries(checkpoint)
    try:
        require_finite(content, f"{path}: not written")
    except InputError as error:
        raise InputError(
            f"{error}; begin anew (--restart, or another --output) with a lower learning rate"
        ) from None
    content |= {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": digest(content)}
    with atomic_write(path) as file:
        torch.save(content, file)


def _entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the entries as plain values and tensors, as they are stored in a file."""
    entries = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
    if checkpoint.critic is None:  # files without one can be read by earlier code
        del entries["critic"]
    if checkpoint.grid is not None:
        entries["grid"] = list(checkpoint.grid[:-1])  # JSON has no infinity
    return entries | {"config": checkpoint.config.model_dump(mode="json")}


def load_checkpoint(path: Path | str, of_autoencoder: bool = False) -> Checkpoint:
    """Returns the checkpoint in a .pt or .safetensors file, on the CPU, without running any code.

    of_autoencoder: whether an autoencoder in training is asked for, and no other kind. Raises
    InputError if the file is missing, not a checkpoint or of an unknown version, or names the first
    invalid entry; DamagedCheckpoint if it is truncated or altered.
    """
    path = Path(path)
    published = path.suffix == ".safetensors"
    content = _read_published(path) if published else _read_saved(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project")
    try:
        named_tensors(content, most=2 * path.stat().st_size)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    version = content.pop("format_version", None)
    if type(version) is not int or version not in READABLE:
        said, known = repr(version)[:60], " and ".join(map(str, READABLE))
        raise InputError(f"{path}: format version {said}; this code reads {known}")
    if content.pop("digest", None) != digest(content):
        raise DamagedCheckpoint(f"{path}: damaged, its content is not what was saved")
    checkpoint = _checked(content, path, version)
    if (checkpoint.kind == "autoencoder") != of_autoencoder:
        asked = "an autoencoder" if of_autoencoder else "a diffusion model"
        raise InputError(f"{path}: kind: {checkpoint.kind}, where that of {asked} is asked for")
    states = {name: getattr(checkpoint, name) for name in ("model", "ema", "walker")}
    for name, state in states.items():
        if state is not None and (wrong := misfit(state, checkpoint.config, checkpoint.kind)):
            raise InputError(f"{path}: {name}: not the network of its config: {wrong}")
    others = {"critic": checkpoint.critic, "optimizer": checkpoint.optimizer}
    require_finite({**states, **others}, path)
    return checkpoint


def _checked(content: dict[Any, Any], path: Path, version: int) -> Checkpoint:
    """Builds the checkpoint. Raises InputError that names the first invalid entry."""
    num_steps = content.pop("num_steps", None) if version == 1 else None
    known = [entry.name for entry in fields(Checkpoint)]
    if unknown := [name for name in content if name not in known]:
        raise InputError(f"{path}: {str(unknown[0])[:60]!r}: unknown; known: {', '.join(known)}")
    if not isinstance(content.get("config"), dict):
        raise InputError(f"{path}: its config: missing, or not a mapping of keys to values")
    config = make_config(content["config"], f"{path}: its config")
    content["config"] = config.model_copy(update={"codec": config.codec.found_from(path.parent)})
    if version == 1 and num_steps is not None:
        if type(num_steps) is not int or not 1 <= num_steps <= 2**20:
            raise InputError(f"{path}: num_steps: not a whole number from 1 to {2**20}")
        content |= progressive_student(content["config"], num_steps)
    elif isinstance(content.get("grid"), list):
        content["grid"] = (*content["grid"], math.inf)
    for name in ("model", "ema"):  # published weights may have half the precision
        if isinstance(content.get(name), dict):
            content[name] = {
                key: t.float() if isinstance(t, Tensor) and t.dtype in HALF else t
                for key, t in content[name].items()
            }
    try:
        return Checkpoint(**content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


def progressive_student(config: Config, num_steps: int) -> dict[str, Any]:
    """Returns grid and sampler of a student of progressive distillation: uniform, DDIM.

    For formats that store the number of steps only: version 1, and the paper's checkpoints.
    """
    grid = uniform_grid(build_schedule(config), num_steps)
    return {"grid": tuple(grid.tolist()), "sampler": "ddim"}


# The only functions that a pickle of tensors and plain values calls. Others that torch.load allows
# can request any amount of memory, for example bytearray(10**10).
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")
CALLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
CALLED |= {f"torch {name}Storage" for name in STORAGES}


def _read_saved(path: Path) -> Any:
    """Returns the content of a file written by save_checkpoint."""
    with reading(path):
        require_regular_file(path)
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sum(sizes.values()) > path.stat().st_size or len(sizes) < len(archive.infolist()):
                raise zipfile.BadZipFile("compressed or overlapping")
            (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
            code = pickletools.genops(archive.read(pickled))
            called = {text for opcode, text, _ in code if opcode.name.endswith(("GLOBAL", "INST"))}
        if not called <= CALLED:
            raise zipfile.BadZipFile("calls what it should not")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)


# --- publishing -----------------------------------------------------------------------------------

# Entries that are not in the header of a published file.
NOT_PUBLISHED = ("model", "ema", "walker", "critic", "optimizer", "scaler")


def publish_checkpoint(path: Path, checkpoint: Checkpoint, half: bool) -> None:
    """Writes the weights to sample with as .safetensors; the other entries go into its header.

    half: store float16, half as large. load_checkpoint reads both. Raises InputError for weights
    that are not finite, which in float16 includes those beyond 65,504.
    """
    # Weights are channels_last on GPUs. float64 is a table of levels, which must stay apart.
    weights = {name: t.contiguous() for name, t in checkpoint.weights.items()}
    narrow = torch.float32 if half else None
    model = {name: t.half() if t.dtype == narrow else t for name, t in weights.items()}
    require_finite(model, f"{path}: not written" + (", as in half precision" if half else ""))
    entries = {k: v for k, v in _entries(checkpoint).items() if k not in NOT_PUBLISHED}
    entries["digest"] = digest({**entries, "model": model})
    entries |= {"format": FORMAT, "format_version": FORMAT_VERSION}
    header = {name: json.dumps(value) for name, value in entries.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(model, header))


def _read_published(path: Path) -> dict[str, Any]:
    """Returns the content of a file written by publish_checkpoint."""
    header, model = read_safetensors(path)
    with reading(path):
        return {**{name: json.loads(text) for name, text in header.items()}, "model": model}
