"""Builds the network and the schedule of a config, and loads weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion.gaussian import OUTPUT_TYPES
from diffusion.grids import Grid, coarser_grid, uniform_grid, uniform_times
from diffusion.schedule import SCHEDULES, Schedule, level_dtype, make_schedule
from models.autoencoder import Autoencoder
from models.networks import NETWORKS
from pipeline.codec_sections import Shape
from pipeline.config import Config
from pipeline.values import TABLE
from utils.command import InputError

N = TypeVar("N", bound=nn.Module)


def build_network(config: Config, device: torch.device, dropout: float | None = None) -> nn.Module:
    """Returns the config's network with new random weights, in the device's fast memory format.

    That is channels_last on GPUs. On a CPU it gains up to 5% on wide networks, but GroupNorm with
    one channel a group, as in small networks, takes several times as long.
    """
    sizes = config.model.model_dump(exclude={"name"})
    if dropout is not None:
        sizes["dropout"] = dropout
    channels, image_size, _ = image_shape(config)
    network = NETWORKS[config.model.name].build(
        image_size=image_size,
        image_channels=channels,
        output_channels=channels * OUTPUT_TYPES[config.diffusion.prediction].channels,
        **sizes,
    )
    return _in_fast_format(network, device)


def build_autoencoder_in_training(
    config: Config, device: torch.device, dropout: float | None = None
) -> Autoencoder:
    """Returns the autoencoder that the config's section of that name describes, with new weights.

    dropout: it has none.
    """
    return _in_fast_format(Autoencoder(config.autoencoder.sizes(config.data.channels)), device)


# The network of each kind of checkpoint.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "base": build_network,
    "student": build_network,
    "autoencoder": build_autoencoder_in_training,
}


def _in_fast_format(network: N, device: torch.device) -> N:
    fast = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    if level_dtype(device) == torch.float32:
        network = network.float()  # some have a table of noise levels
    return network.to(device, memory_format=fast)  # type: ignore[call-overload, no-any-return]


def image_shape(config: Config) -> Shape:
    """Returns (C, H, W) of what the model works on: an image, or its latents."""
    return config.codec.shape(config.data.image_size, config.data.channels)


def build_schedule(config: Config) -> Schedule:
    """Returns the config's noise schedule. Raises InputError if its levels are a table."""
    diffusion = config.diffusion
    if diffusion.schedule == TABLE:
        raise InputError(
            f"diffusion.schedule: {TABLE}: the levels of an imported checkpoint, which can be "
            f"sampled from and distilled; to train take {', '.join(SCHEDULES)}"
        )
    return make_schedule(diffusion.schedule, diffusion.logsnr_min, diffusion.logsnr_max)


def uniform_levels(config: Config, table: Sequence[float] | None, num_steps: int) -> Grid:
    """Returns a uniform grid of the config's schedule, or of the table that stands in its place.

    Raises InputError for more steps than the table has levels.
    """
    if config.diffusion.schedule != TABLE or table is None:
        return uniform_grid(build_schedule(config), num_steps)
    if num_steps >= len(table):
        raise InputError(
            f"{num_steps} steps: this checkpoint has a table of {len(table) - 1} noise levels; "
            "take at most as many steps"
        )
    return coarser_grid(torch.tensor(table, dtype=torch.float64), uniform_times(num_steps))


def misfit(weights: Mapping[str, Tensor], config: Config, kind: str = "base") -> str:
    """Returns which weights are missing, left over or of another shape; "" if all fit.

    Builds the config's network on the meta device, so that no config can exhaust the memory.
    kind: of the checkpoint.
    """
    try:
        with torch.device("meta"):
            wanted = BUILDERS[kind](config, torch.device("meta")).state_dict()
    except RuntimeError:  # the number of bytes overflows
        return "the config asks for a network larger than any memory"
    return mismatch(weights, wanted)


def mismatch(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Returns in which names and shapes the weights differ from the wanted ones; "" if in none."""
    wrong = {
        "missing": [name for name in wanted if name not in weights],
        "left over": [repr(name)[1:-1] for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:3])}{', ..' if len(names) > 3 else ''}"
        for what, names in wrong.items()
        if names
    )


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Loads the weights into the network. Raises InputError with where if they do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(f"{where}: weights of another network: {first[0].strip()}") from None


def matching_weights(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights whose name and shape the network has too."""
    own = network.state_dict()
    return {k: t for k, t in weights.items() if k in own and own[k].shape == t.shape}
