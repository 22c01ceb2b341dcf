"""Reads a folder of the diffusers library: JSON and safetensors alone, without its loader."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from diffusion.betas import BETAS, NO_SIGNAL, grid_of_betas
from diffusion.grids import Grid, require_grid
from pipeline.config import explain
from pipeline.values import one_of
from utils.command import InputError, warn
from utils.files import require_regular_file
from utils.values import Fraction, ListOf, Section

NETWORK, SCHEDULERS = "UNet2DModel", ("DDPMScheduler", "DDIMScheduler")
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
LARGEST_JSON = 2**24  # bytes
# The names of an attention's layers in files of diffusers before 0.17.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class SchedulerFile(Section):
    """scheduler_config.json, as far as it is used; the defaults are those of diffusers."""

    model_config = ConfigDict(extra="ignore")

    num_train_timesteps: Annotated[int, Field(ge=1, le=2**16)]
    beta_start: Fraction
    beta_end: Fraction
    beta_schedule: Annotated[str, one_of(BETAS)]
    trained_betas: ListOf[Annotated[float, Field(gt=0.0, le=1.0)]] | None = None
    prediction_type: Annotated[str, one_of(PREDICTIONS)] = "epsilon"
    predict_epsilon: bool | None = None  # of diffusers before 0.17, in place of prediction_type
    variance_type: str | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False


class NetworkFile(Section):
    """config.json of a UNet2DModel, as far as it is not passed on; see network_arguments."""

    model_config = ConfigDict(extra="allow")

    sample_size: Annotated[int, Field(ge=1, le=1024)] | ListOf[int]
    in_channels: Literal[1, 3]
    out_channels: int
    dropout: Fraction = 0.0
    num_class_embeds: int | None = None


class Scheduler(NamedTuple):
    """What a scheduler says: all its levels, what the network predicts, whether to clip."""

    grid: Grid
    prediction: str
    clip: bool


def require_pipeline(folder: Path) -> None:
    """Raises InputError unless it is a pipeline of a UNet2DModel and a known scheduler alone."""
    path = folder / "model_index.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of a diffusers pipeline")
    parts = {
        name: str(value[1])
        for name, value in read_json(path).items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    for name, known in (("unet", (NETWORK,)), ("scheduler", SCHEDULERS)):
        if parts.get(name) not in known:
            raise InputError(
                f"{path}: {name}: {parts.get(name, 'missing')}; {' or '.join(known)} is taken"
            )
    if others := sorted(parts.keys() - {"unet", "scheduler"}):
        raise InputError(f"{path}: {others[0]}: only pipelines of a unet and a scheduler are taken")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in the file. Raises InputError that names the file."""
    try:
        require_regular_file(path)
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{path}: larger than {LARGEST_JSON:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a folder that diffusers has saved") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of keys to values")
    return values


def place_of(folder: Path, part: str) -> Path:
    """Returns the folder of a part: <folder>/<part>, or the folder itself in old pipelines."""
    return folder / part if (folder / part).is_dir() else folder


def read_scheduler(path: Path) -> Scheduler:
    """Returns the levels of a scheduler_config.json, and what it says of the network.

    Raises InputError that names the key for what it cannot give.
    """
    try:
        file = SchedulerFile.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, depth=1)}") from None
    if file.predict_epsilon is not None:
        prediction = "epsilon" if file.predict_epsilon else "sample"
        file = file.model_copy(update={"prediction_type": prediction})
    if (file.variance_type or "").startswith("learned"):
        raise InputError(f"{path}: variance_type: {file.variance_type}; a fixed one is taken")
    count, trained = file.num_train_timesteps, file.trained_betas
    if trained is not None and len(trained) != count:
        raise InputError(f"{path}: trained_betas: {len(trained)} of them for {count} timesteps")
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
    else:
        betas = BETAS[file.beta_schedule](count, file.beta_start, file.beta_end)
    grid = grid_of_betas(betas, file.rescale_betas_zero_snr)
    try:
        require_grid(grid)
        require_grid(grid.float())  # the network is told of a level in float32
    except ValueError as error:
        raise InputError(f"{path}: its betas are no noise schedule: {error}") from None
    if grid[0] <= NO_SIGNAL and file.prediction_type == "epsilon":
        raise InputError(
            f"{path}: prediction_type: epsilon says nothing of the image where there is no signal "
            "(rescale_betas_zero_snr, or a beta of 1); v_prediction or sample is taken"
        )
    if not file.set_alpha_to_one:
        warn(f"{path}: set_alpha_to_one: false; the last step ends on x_hat all the same")
    clip = file.clip_sample and file.clip_sample_range == 1.0 and not file.thresholding
    if clip != (file.clip_sample or file.thresholding):
        warn(f"{path}: only a clip_sample to [-1, 1] is known; samples are not clipped")
    return Scheduler(grid, PREDICTIONS[file.prediction_type], clip)


def read_network(path: Path) -> NetworkFile:
    """Returns a UNet2DModel's config.json. Raises InputError that names the key."""
    values = read_json(path)
    if values.get("_class_name", NETWORK) != NETWORK:
        raise InputError(f"{path}: _class_name: {values['_class_name']}; {NETWORK} is taken")
    try:
        file = NetworkFile.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, depth=1)}") from None
    if not isinstance(file.sample_size, int):
        if len(set(file.sample_size)) != 1:
            raise InputError(
                f"{path}: sample_size: {list(file.sample_size)}; square ones are taken"
            )
        file = file.model_copy(update={"sample_size": file.sample_size[0]})
    if file.out_channels != file.in_channels:
        learned = ", as for a learned variance" * (file.out_channels == 2 * file.in_channels)
        raise InputError(
            f"{path}: out_channels: {file.out_channels} for {file.in_channels} in_channels"
            f"{learned}; as many are taken"
        )
    return file


def network_arguments(file: NetworkFile) -> dict[str, Any]:
    """Returns the arguments of UNet2DModel that are neither the images' nor dropout.

    null is an argument too: attention_head_dim: null is one head, a missing one is heads of 8.
    """
    own = {**(file.model_extra or {}), "num_class_embeds": file.num_class_embeds}
    return {key: value for key, value in own.items() if not key.startswith("_")}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the network's weights, in float32. Raises InputError where only pickles lie."""
    path = folder / WEIGHTS
    try:
        require_regular_file(path)
        path.open("rb").close()  # raises the usual OSError, which safetensors does not
        weights = safetensors.torch.load_file(path)
    except FileNotFoundError:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        held = f"; {pickles[0]} may run code and is not read" if pickles else ""
        raise InputError(
            f"{path}: no such file{held}; save it with safe_serialization=True"
        ) from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file: {str(error)[:100]}") from None
    old = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(RENAMED)})\.")
    return {
        old.sub(lambda m: f"{m[1]}.{RENAMED[m[2]]}.", name): tensor.float()
        for name, tensor in weights.items()
    }
