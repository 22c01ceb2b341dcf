"""What a checkpoint may hold: its name, grid, tensors and plain values; their digest."""

import errno
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from diffusion.grids import require_grid
from utils.command import DamagedCheckpoint, InputError
from utils.files import require_regular_file

State = dict[str, Tensor]


def as_name(name: str) -> str:
    """Returns the name. Raises ValueError unless files and folders can be named after it."""
    fits = len(name.encode(errors="replace")) <= 200 and name not in ("", ".", "..")
    if not fits or "/" in name or not name.isprintable():
        raise ValueError(f"{name[:60]!r}: take at most 200 bytes, printable, without /")
    return name


def as_grid(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the levels. Raises ValueError unless they are a grid (see require_grid)."""
    require_grid(torch.tensor(levels, dtype=torch.float64))
    return levels


def as_state(value: Any) -> State:
    """Returns the value. Raises ValueError unless it maps names to floating-point tensors."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("not a mapping of names to tensors")
    for key, tensor in value.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key[:60]!r} is not a tensor of floating-point numbers")
    return value


# The entries of a torch.amp.GradScaler's state.
SCALER: dict[str, type] = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float),
    **dict.fromkeys(("growth_interval", "_growth_tracker"), int),
}


def as_scaler(value: Any) -> dict[str, Any]:
    """Returns the value. Raises ValueError unless it is empty or the state of a GradScaler."""
    if not isinstance(value, dict) or (value and value.keys() != SCALER.keys()):
        raise ValueError(f"not a mapping of {', '.join(SCALER)} to numbers")
    for key, number in value.items():
        most = 2**31 - 1 if SCALER[key] is int else 2**127
        fits = type(number) is SCALER[key]
        if not fits or not 0 <= number <= most:
            raise ValueError(f"{key}: not a number from 0 to {most} ({SCALER[key].__name__})")
    return value


def require_name(name: str, where: object) -> None:
    """Raises InputError unless a checkpoint may have the name. where: the origin of the name."""
    try:
        as_name(name)
    except ValueError as error:
        raise InputError(f"{where}: its name {error}") from None


# The types of tensors in a checkpoint; others (sparse, quantised, ..) are refused.
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
DTYPES |= {torch.int64, torch.int32, torch.uint8, torch.bool}


def named_tensors(content: Any, most: float = math.inf) -> list[tuple[str, Tensor]]:
    """Returns all tensors in nested mappings and lists, with dotted names: model.conv_in.bias.

    Raises ValueError for values of other types, for deep nesting, and for more than `most` bytes
    in all: with strides of 0 or a repeated list, a short file can expand to a very large value.
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
    """Raises InputError that names the first tensor with a NaN or an infinity in it."""
    tensors = [(n, t) for n, t in named_tensors(entries) if t.is_floating_point() and t.numel()]
    if not tensors:
        return
    # The maximum norm: unlike a sum, it cannot overflow.
    norms = torch._foreach_norm([tensor.detach() for _, tensor in tensors], math.inf)
    finite = torch.stack([norm.isfinite() for norm in norms]).tolist()
    if not all(finite):
        name = tensors[finite.index(False)][0]
        raise InputError(f"{where}: {name[:100]!r} is not finite (NaN or infinity)")


@contextmanager
def reading(path: Path, what: str = "a checkpoint") -> Iterator[None]:
    """Turns the errors of reading a file into InputError. Wrap nothing but the reading in it.

    what: what the file should be, with its article, for the message.
    """
    damaged = f"{path}: not {what} of this project, or damaged"
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what.split()[-1]}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, where {what} file is asked for") from None
    except PermissionError:
        raise InputError(f"{path}: not allowed to read it") from None
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read it") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # raised by a reader that misread the file
            raise DamagedCheckpoint(damaged) from None
        raise InputError(f"{path}: cannot be read now: {error.strerror}") from None
    except Exception as error:  # damaged archives and other pickles may raise anything
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise InputError(f"{path}: not enough memory to read it") from None
        raise DamagedCheckpoint(damaged) from None


def read_safetensors(path: Path, what: str = "a checkpoint") -> tuple[dict[str, str], State]:
    """Returns the header and the tensors of a .safetensors file; see reading."""
    with reading(path, what):
        require_regular_file(path)
        path.open("rb").close()  # raises the usual OSError, which safetensors does not
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest(value: Any) -> str:
    """Returns the SHA-256 of nested tensors, mappings, sequences and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().flatten().contiguous()
            flat = flat.as_strided(
                (len(flat),), (1,)
            )  # the stride of a single number may be anything
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
