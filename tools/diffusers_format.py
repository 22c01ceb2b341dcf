"""A checkpoint as the parts of a diffusers folder: a UNet2DModel and a DDIMScheduler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion.grids import Grid
from models.unet_section import UNetSection
from pipeline.build import image_shape
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint_checks import State
from tools.diffusers_unet import unet_config, unet_weights
from utils.command import InputError

PREDICTION_TYPES = {"v": "v_prediction", "eps": "epsilon", "x": "sample"}
ALPHA_ERROR = 1e-3  # the largest relative error of alpha where alpha divides (prediction: eps)


class Exported(NamedTuple):
    """The parts of a diffusers folder.

    unet, scheduler: their configs; weights: of the unet, in float32; steps: to sample in; clip:
    whether x_hat is clipped; patch_size: what pixel_unshuffle does to the images before the unet.
    """

    unet: dict[str, Any]
    weights: State
    scheduler: dict[str, Any]
    steps: int
    clip: bool
    patch_size: int = 1


def exported(
    checkpoint: Checkpoint, path: Path, steps: int | None, guidance: float | None
) -> Exported:
    """Returns the parts of a diffusers folder that samples as the checkpoint does.

    path: its file, for errors. steps: of a base model. guidance: the weight to export, of a network
    that takes it as an input. Raises InputError for what diffusers cannot hold exactly.
    """
    prediction, model = checkpoint.config.diffusion.prediction, checkpoint.config.model
    if model.name not in EXPORTS:
        raise InputError(
            f"{path}: model.name: {model.name}, which UNet2DModel cannot be; "
            f"{', '.join(EXPORTS)} can be exported"
        )
    if checkpoint.config.codec.name != "pixels":
        raise InputError(
            f"{path}: codec.name: {checkpoint.config.codec.name}; models of pixels can be exported"
        )
    if prediction not in PREDICTION_TYPES:
        raise InputError(
            f"{path}: diffusion.prediction: {prediction}, which no scheduler of diffusers reads; "
            f"{', '.join(PREDICTION_TYPES)} can be exported"
        )
    require_own_steps(checkpoint, path, steps)
    if checkpoint.sampler not in (None, "ddim") and checkpoint.num_steps != 1:
        raise InputError(
            f"{path}: sampler: {checkpoint.sampler}, which DDIMScheduler is not; a student of one "
            "step, or one distilled for ddim, can be exported"
        )
    _require_guidance(guidance, model.guidance, path)
    return EXPORTS[model.name](checkpoint, path, checkpoint.levels(steps), guidance)


def require_own_steps(checkpoint: Checkpoint, path: Path, steps: int | None) -> None:
    """Raises InputError if a student is asked for another number of steps than its own."""
    if checkpoint.num_steps and steps not in (None, checkpoint.num_steps):
        raise InputError(
            f"--steps {steps}: {path} was distilled for {checkpoint.num_steps}; leave --steps out"
        )


def _require_guidance(weight: float | None, wanted: bool, path: Path) -> None:
    if wanted and weight is None:
        raise InputError(
            f"{path}: model.guidance: UNet2DModel does not take the guidance weight as an input; "
            "give the one weight to export, e.g. --guidance 1"
        )
    if weight is not None and not wanted:
        raise InputError(
            f"--guidance {weight}: {path} does not take a guidance weight; leave --guidance out"
        )
    if weight is not None and not 0.0 <= weight <= 1000.0:  # not NaN either
        raise InputError(f"--guidance {weight}: take a number from 0 to 1000")


# --- the scheduler --------------------------------------------------------------------------------


# A scheduler's config has them even where trained_betas takes their place.
UNUSED = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def scheduler_config(checkpoint: Checkpoint, levels: Grid, path: Path) -> dict[str, Any]:
    """Returns the config of a DDIMScheduler whose N timesteps are the levels of the grid.

    levels: logsnr from t = 1 down, the last one +inf. alpha^2 = prod_j (1 - beta_j). DDIMScheduler
    rounds 1 - beta to multiples of 6e-8, so that in fewer than eight steps an alpha of 4.5e-5 at
    t = 1 (logsnr -20) becomes 0: a difference of 0.02 of 255 levels, which rounds one pixel in 300
    differently. Raises InputError where a network that predicts eps would be divided by it.
    """
    alphas = torch.sigmoid(levels[:-1].flip(0))  # alpha^2, from the least noise on
    before = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    betas = 1 - alphas / before
    prediction = checkpoint.config.diffusion.prediction
    held = torch.cumprod(1 - betas.float(), 0).double()  # as DDIMScheduler computes it
    if prediction == "eps" and ((held / alphas).sqrt() - 1).abs().max() > ALPHA_ERROR:
        raise InputError(
            f"{path}: diffusion.prediction: eps, whose first step divides by alpha = "
            f"{alphas[-1].sqrt():.1e}, which the float32 betas of DDIMScheduler do not hold; "
            "distil a student that predicts v, or take a larger diffusion.logsnr_min"
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        **UNUSED,
        "prediction_type": PREDICTION_TYPES[prediction],
        "clip_sample": checkpoint.config.sampling.clip,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


# --- this repository's UNet -----------------------------------------------------------------------


def _from_unet(
    checkpoint: Checkpoint, path: Path, levels: Grid, guidance: float | None
) -> Exported:
    """Returns the parts for models/unet.py."""
    model, steps = checkpoint.config.model, len(levels) - 1
    assert isinstance(model, UNetSection)
    return Exported(
        unet=unet_config(model, image_shape(checkpoint.config), steps, path),
        weights=unet_weights(model, checkpoint.weights, levels, guidance),
        scheduler=scheduler_config(checkpoint, levels, path),
        steps=steps,
        clip=checkpoint.config.sampling.clip,
        patch_size=model.patch_size,
    )


# --- a network that came from diffusers -----------------------------------------------------------


def _from_diffusers(
    checkpoint: Checkpoint, path: Path, levels: Grid, guidance: float | None
) -> Exported:
    """Returns the parts for models/diffusers_unet.py: its own network, with its whole table.

    table: the logsnr of each timestep, from the least noise on. Raises InputError for a grid that
    is not that of evenly spaced timesteps, because DDIMScheduler takes no other steps.
    """
    model: Any = checkpoint.config.model
    channels, image_size, _ = image_shape(checkpoint.config)
    given = {"sample_size": image_size, "in_channels": channels, "out_channels": channels}
    table, steps = checkpoint.weights["table"].double(), len(levels) - 1
    apart, left_over = divmod(len(table), steps)
    if left_over or not torch.allclose(table.flip(0)[::apart], levels[:-1], rtol=0, atol=1e-4):
        raise InputError(
            f"{path}: grid: {steps} steps that are not evenly spaced in the {len(table)} timesteps "
            "of its network; DDIMScheduler takes no others"
        )
    whole = torch.cat([table.flip(0), levels[-1:]])
    return Exported(
        unet={"_class_name": "UNet2DModel", **model.config, **given},
        weights={
            name.removeprefix("unet."): tensor.float().contiguous()
            for name, tensor in checkpoint.weights.items()
            if name.startswith("unet.")
        },
        scheduler=scheduler_config(checkpoint, whole, path),
        steps=steps,
        clip=checkpoint.config.sampling.clip,
    )


EXPORTS: dict[str, Callable[[Checkpoint, Path, Grid, float | None], Exported]] = {
    "unet": _from_unet,
    "diffusers_unet": _from_diffusers,
}
