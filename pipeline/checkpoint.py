"""Checkpoints that describe themselves. Loading runs no code; a file is written whole or not."""

import errno
import hashlib
import json
import math
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
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

from diffusion.grids import Grid, require_grid, uniform_grid
from pipeline.config import Config, SamplerName, explain, make_config
from pipeline.network import build_schedule, misfit
from utils.command import DamagedCheckpoint, InputError
from utils.files import atomic_write, require_regular_file

FORMAT = "progressive-distillation"
FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 had num_steps in the place of grid and sampler
NOT_OURS = "not a checkpoint of this project"

State = dict[str, Tensor]

# --- what the entries may be ----------------------------------------------------------------------


def _name(name: str) -> str:
    fits = len(name.encode(errors="replace")) <= 200 and name not in ("", ".", "..")
    if not fits or "/" in name or not name.isprintable():  # paths of results are made of it
        raise ValueError(f"{name[:60]!r}: take at most 200 bytes, printable, without /")
    return name


def _grid(levels: tuple[float, ...]) -> tuple[float, ...]:
    require_grid(torch.tensor(levels, dtype=torch.float64))
    return levels


def _state(value: Any) -> State:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("not a mapping of names to tensors")
    for key, tensor in value.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key[:60]!r} is not a tensor of floating-point numbers")
    return value


# The state of a torch.amp.GradScaler.
SCALER: dict[str, type] = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float),
    **dict.fromkeys(("growth_interval", "_growth_tracker"), int),
}


def _scaler(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or (value and value.keys() != SCALER.keys()):
        raise ValueError(f"not a mapping of {', '.join(SCALER)} to numbers")
    for key, number in value.items():
        most = 2**31 - 1 if SCALER[key] is int else 2**127
        fits = type(number) is SCALER[key]
        if not fits or not 0 <= number <= most:
            raise ValueError(f"{key}: not a number from 0 to {most} ({SCALER[key].__name__})")
    return value


CheckedState = Annotated[State, PlainValidator(_state)]
Short = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Checkpoint:
    """A network with all that is needed to use it, and to go on training it.

    kind: base or student. name: of the config. update, stage: how far it was trained. grid: the
    noise levels that a student was made for, as logsnr from t = 1 down to +inf; sampler: how it is
    sampled on them; both None for a base model. model: the weights being trained; ema: their
    average; walker: the average that walks the paths of its distillation; None where none is kept.
    optimizer: None in a file that is not trained on; scaler: of the loss in fp16. lineage: the
    digest of the weights that it began with: of a student its teacher's, of a base model those of
    train.py --initialise (initial).

    Raises pydantic.ValidationError for entries that cannot be.
    """

    kind: Literal["base", "student"]
    name: Annotated[str, AfterValidator(_name)]
    config: Config
    update: Annotated[int, Field(ge=0, le=2**31)]
    stage: Annotated[int, Field(ge=0, le=2**10)]
    model: CheckedState
    grid: Annotated[tuple[float, ...], AfterValidator(_grid), Field(max_length=2**20)] | None = None
    sampler: SamplerName | None = None
    ema: CheckedState | None = None
    walker: CheckedState | None = None
    optimizer: dict[str, Any] | None = None
    scaler: Annotated[dict[str, Any], PlainValidator(_scaler)] = field(default_factory=dict)
    lineage: Annotated[dict[Short, Short], Field(max_length=8)] = field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Checkpoint":
        base = self.kind == "base"
        if not base == (self.grid is None) == (self.sampler is None) == (self.stage == 0):
            raise ValueError(
                f"kind: {self.kind}, but stage is {self.stage}, num_steps {self.num_steps} and "
                f"sampler {self.sampler}; a base model has stage 0 and neither of the others"
            )
        return self

    @property
    def num_steps(self) -> int | None:
        """The sampling steps that a student was made for, None for a base model."""
        return None if self.grid is None else len(self.grid) - 1

    def levels(self, num_steps: int | None = None) -> Grid:
        """The grid to sample on in so many steps: a student's own, or a uniform one."""
        if self.grid is not None and num_steps in (None, self.num_steps):
            return torch.tensor(self.grid, dtype=torch.float64)
        return uniform_grid(build_schedule(self.config), num_steps or self.config.sampling.steps)

    @property
    def weights(self) -> State:
        """The weights to sample with and to teach with: the average where there is one."""
        return self.model if self.ema is None else self.ema


def require_name(name: str, where: object) -> None:
    """Raises InputError unless a checkpoint may have the name. where: what it is taken from."""
    try:
        _name(name)
    except ValueError as error:
        raise InputError(f"{where}: its name {error}") from None


# Of the tensors that torch.save is given here. Others (sparse, quantised, ..) are refused.
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
DTYPES |= {torch.int64, torch.int32, torch.uint8, torch.bool}


def named_tensors(content: Any, most: float = math.inf) -> list[tuple[str, Tensor]]:
    """All tensors in nested mappings and lists, with dotted names such as model.conv_in.bias.

    Raises ValueError for values of other types, deep nesting, and more than so many bytes in all:
    a short file can stand for a very large value, by strides of 0 or the same list many times.
    """
    found: list[tuple[str, Tensor]] = []
    size = 0

    def visit(value: Any, name: str, depth: int) -> None:
        nonlocal size
        size += 1
        wrong, items = "", []
        if isinstance(value, Tensor):
            plain = type(value) is Tensor and value.layout == torch.strided and not value.is_neg()
            wrong = "" if plain and value.dtype in DTYPES else "a tensor of an unknown kind"
            size += math.prod(value.shape) * value.element_size()
            found.append((name, value))
        elif isinstance(value, dict):
            wrong = "" if all(type(key) in (str, int) for key in value) else "a key of another type"
            size += sum(len(key) for key in value if isinstance(key, str))
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        elif isinstance(value, str):
            size += len(value)
        elif type(value) is int:
            wrong = "" if abs(value) < 2**64 else "a number out of range"
        elif not (value is None or type(value) in (bool, float)):
            wrong = f"a value of type {type(value).__name__}"
        wrong = wrong or ("larger than the file" if size > most else "")
        if wrong or depth > 16:
            raise ValueError(f"{name[:100]!r} is {wrong or 'nested too deeply'}")
        for key, item in items:
            visit(item, f"{name}.{key}" if name else str(key), depth + 1)

    visit(content, "", 0)
    return found


def require_finite(entries: Mapping[str, Any], where: object) -> None:
    """Raises InputError that names the first tensor which holds a NaN or an infinity."""
    tensors = [(n, t) for n, t in named_tensors(entries) if t.is_floating_point() and t.numel()]
    if not tensors:
        return
    # The largest absolute value: unlike a sum, it cannot overflow.
    norms = torch._foreach_norm([tensor.detach() for _, tensor in tensors], math.inf)
    finite = torch.stack([norm.isfinite() for norm in norms]).tolist()
    if not all(finite):
        name = tensors[finite.index(False)][0]
        raise InputError(f"{where}: {name[:100]!r} is not finite (NaN or infinity)")


def digest(value: Any) -> str:
    """SHA-256 of nested tensors, mappings, sequences and plain values, names and types too."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().flatten().contiguous()
            flat = flat.as_strided((len(flat),), (1,))  # that of one number may be any
            sha.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            sha.update(f"mapping of {len(value)}\n".encode())
            for key in sorted(value, key=str):
                sha.update(f"{key!r}\n".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            sha.update(f"sequence of {len(value)}\n".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r}\n".encode())

    add(value)
    return sha.hexdigest()


# --- files ----------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file whole, or leaves what was there.

    Raises InputError for numbers that are not finite: load_checkpoint would refuse the file.
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
    """The entries as a file holds them, the config as plain values."""
    entries = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
    if checkpoint.grid is not None:
        entries["grid"] = list(checkpoint.grid[:-1])  # JSON knows no infinity
    return entries | {"config": checkpoint.config.model_dump(mode="json")}


def load_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in the file, on the CPU; nothing in the file is executed.

    Raises InputError that says what is wrong: no such file, damaged, not a checkpoint, of an
    unknown version, or the first entry that is not what it should be.
    """
    path = Path(path)
    published = path.suffix == ".safetensors"
    content = _read_published(path) if published else _read_saved(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: {NOT_OURS}")
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
    states = {name: getattr(checkpoint, name) for name in ("model", "ema", "walker")}
    for name, state in states.items():
        if state is not None and (wrong := misfit(state, checkpoint.config)):
            raise InputError(f"{path}: {name}: not the network of its config: {wrong}")
    require_finite({**states, "optimizer": checkpoint.optimizer}, path)
    return checkpoint


def _checked(content: dict[Any, Any], path: Path, version: int) -> Checkpoint:
    """The checkpoint of these entries. Raises InputError that names the first wrong one."""
    num_steps = content.pop("num_steps", None) if version == 1 else None
    known = [entry.name for entry in fields(Checkpoint)]
    if unknown := [name for name in content if name not in known]:
        raise InputError(f"{path}: {str(unknown[0])[:60]!r}: unknown; known: {', '.join(known)}")
    if not isinstance(content.get("config"), dict):
        raise InputError(f"{path}: its config: missing, or not a mapping of keys to values")
    content["config"] = make_config(content["config"], f"{path}: its config")
    if version == 1 and num_steps is not None:
        content |= _as_version_2(num_steps, content["config"], path)
    elif isinstance(content.get("grid"), list):
        content["grid"] = (*content["grid"], math.inf)
    for name in ("model", "ema"):  # published weights may have half the precision
        if isinstance(content.get(name), dict):
            content[name] = {
                key: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
                for key, t in content[name].items()
            }
    try:
        return Checkpoint(**content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


def _as_version_2(num_steps: Any, config: Config, path: Path) -> dict[str, Any]:
    """The grid and the sampler of a student whose checkpoint has its step count alone."""
    if type(num_steps) is not int or not 1 <= num_steps <= 2**20:
        raise InputError(f"{path}: num_steps: not a whole number from 1 to {2**20}")
    grid = uniform_grid(build_schedule(config), num_steps)
    return {"grid": tuple(grid.tolist()), "sampler": "ddim"}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a reader of files raises into InputError; holds calls of readers alone."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, where a checkpoint file is asked for") from None
    except PermissionError:
        raise InputError(f"{path}: not allowed to read it") from None
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read it") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # by a reader that lost its way in the file
            raise DamagedCheckpoint(f"{path}: {NOT_OURS}, or damaged") from None
        raise InputError(f"{path}: cannot be read now: {error.strerror}") from None
    except Exception as error:  # what a damaged archive or a foreign pickle raises is unknown
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise InputError(f"{path}: not enough memory to read it") from None
        raise DamagedCheckpoint(f"{path}: {NOT_OURS}, or damaged") from None


# All that a pickle of tensors and plain values has called. What else torch.load would call can ask
# for any amount of memory, as bytearray(10**10) does.
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")
CALLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
CALLED |= {f"torch {name}Storage" for name in STORAGES}


def _read_saved(path: Path) -> Any:
    """What save_checkpoint wrote."""
    with _reading(path):
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


# --- for others to use ---------------------------------------------------------------------------

NOT_PUBLISHED = ("model", "ema", "walker", "optimizer", "scaler")  # of a checkpoint's entries


def publish_checkpoint(path: Path, checkpoint: Checkpoint, half: bool) -> None:
    """Writes the weights to sample with as .safetensors, whose header says what they are.

    half: in float16, in which they are half as large. load_checkpoint reads both. Raises
    InputError for weights that are not finite, in float16 those beyond 65,504.
    """
    weights = {name: t.contiguous() for name, t in checkpoint.weights.items()}  # GPUs' are not
    model = {name: t.half() if half else t for name, t in weights.items()}
    require_finite(model, f"{path}: not written" + (", as in half precision" if half else ""))
    entries = {k: v for k, v in _entries(checkpoint).items() if k not in NOT_PUBLISHED}
    entries |= {"format": FORMAT, "format_version": FORMAT_VERSION}
    entries["digest"] = digest(_without_format({**entries, "model": model}))
    header = {name: json.dumps(value) for name, value in entries.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(model, header))


def _without_format(content: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in content.items() if k not in ("format", "format_version")}


def _read_published(path: Path) -> dict[str, Any]:
    """What publish_checkpoint wrote, as load_checkpoint looks at it."""
    with _reading(path):
        require_regular_file(path)
        with path.open("rb"):  # for the system's own errors
            pass
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {**{name: json.loads(text) for name, text in header.items()}, "model": model}
