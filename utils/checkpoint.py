"""Checkpoints that describe themselves. Loading runs no code; a file is written whole or not."""

import errno
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils.command import DamagedCheckpoint, InputError
from utils.config import Config, make_config
from utils.files import atomic_write

FORMAT = "progressive-distillation"
FORMAT_VERSION = 1
NOT_OURS = "not a checkpoint of this project"

Kind = Literal["base", "student"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A network with all that is needed to use it, and to go on training it.

    kind: base or student. name: of the config. update, stage: how far it was trained. num_steps:
    the sampling steps it was made for, None for a base model. model: the weights being trained;
    ema: their average, None where none is kept. optimizer: None in a file that is not trained on;
    scaler: of the loss in fp16, empty otherwise.
    lineage: of a student, the digest of its teacher's weights.
    """

    kind: Kind
    name: str
    config: Config
    update: int
    stage: int
    num_steps: int | None
    model: State
    ema: State | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        states = [self.model] if self.ema is None else [self.model, self.ema]
        tensors = all(
            isinstance(state, dict) and all(isinstance(t, Tensor) for t in state.values())
            for state in states
        )
        counts = [self.update, self.stage, 1 if self.num_steps is None else self.num_steps]
        if not tensors or not all(isinstance(count, int) for count in counts):
            raise TypeError("not the entries of a checkpoint")

    @property
    def weights(self) -> State:
        """The weights to sample with and to teach with: the average where there is one."""
        return self.model if self.ema is None else self.ema


def digest(value: Any) -> str:
    """SHA-256 of nested tensors, mappings, sequences and plain values, names and types too."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
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


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file whole, or leaves what was there."""
    content = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    content["config"] = checkpoint.config.model_dump(mode="json")
    content |= {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": digest(content)}
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the file, on the CPU; nothing in the file is executed.

    Raises InputError that says what is wrong: no such file, damaged, not a checkpoint, of an
    unknown version, with a config or weights that are not what they should be.
    """
    try:
        if path.suffix == ".safetensors":
            content = _read_published(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
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
    except Exception:  # what a damaged archive or a foreign pickle raises is not documented
        raise DamagedCheckpoint(f"{path}: {NOT_OURS}, or damaged") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: {NOT_OURS}")
    version = content.pop("format_version", None)
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}; this code reads {FORMAT_VERSION}")
    try:
        intact = content.pop("digest", None) == digest(content)
    except Exception:  # tensors of other kinds, lists that hold themselves
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{path}: damaged, its content is not what was saved")
    state = content.get("model")
    if isinstance(state, dict):  # published weights may have half the precision
        content["model"] = {
            name: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in state.items()
        }
    try:
        content["config"] = make_config(dict(content["config"]), f"{path}: its config")
        return Checkpoint(**content)
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: a checkpoint with missing or unknown entries") from None


# --- for others to use ---------------------------------------------------------------------------

NOT_PUBLISHED = ("model", "ema", "optimizer", "scaler")  # of a checkpoint's entries


def publish_checkpoint(path: Path, checkpoint: Checkpoint, half: bool) -> None:
    """Writes the weights to sample with as .safetensors, whose header says what they are.

    half: in float16, in which they are half as large. load_checkpoint reads both.
    """
    weights = {name: t.contiguous() for name, t in checkpoint.weights.items()}  # GPUs' are not
    model = {name: t.half() if half else t for name, t in weights.items()}
    entries = {
        name: getattr(checkpoint, name)
        for name in checkpoint.__dataclass_fields__
        if name not in NOT_PUBLISHED
    }
    entries["config"] = checkpoint.config.model_dump(mode="json")
    entries |= {"format": FORMAT, "format_version": FORMAT_VERSION}
    entries["digest"] = digest(_without_format({**entries, "model": model}))
    header = {name: json.dumps(value) for name, value in entries.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(model, header))


def _without_format(content: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in content.items() if k not in ("format", "format_version")}


def _read_published(path: Path) -> dict[str, Any]:
    """What publish_checkpoint wrote, as load_checkpoint looks at it."""
    with path.open("rb"):  # for the system's own errors
        pass
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata() or {}
        model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {**{name: json.loads(text) for name, text in header.items()}, "model": model}
