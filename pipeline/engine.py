"""How a network is called, fast: autocast, compilation, TF32. What it means stays the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def allow_tf32(engine: EngineConfig) -> None:
    """Lets GPUs multiply float32 in TF32, or not. Other devices take no notice."""
    torch.set_float32_matmul_precision("high" if engine.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = engine.tf32


def sampling_engine(engine: EngineConfig, device: torch.device) -> EngineConfig:
    """As a checkpoint that may come from elsewhere is sampled: by its own engine on a GPU.

    On a CPU eager and in float32, as neither half precision nor a minute of compilation pays there.
    """
    if device.type == "cuda":
        return engine
    return engine.model_copy(update={"precision": "fp32", "compile": False})


def accelerated(
    network: nn.Module, engine: EngineConfig, device: torch.device
) -> Callable[..., Tensor]:
    """The network as losses and samplers call it: compiled and under autocast, if so asked.

    Only the network runs in reduced precision; a Denoiser brings its output back to that of z, so
    that schedule, decoding, target and loss are in float32.
    """
    call: Callable[..., Tensor] = network
    if engine.compile:  # for each batch size anew: one graph for all would be slower in each
        call = torch.compile(network, dynamic=False)
    if engine.precision == "fp32":
        return call
    dtype = AUTOCAST[engine.precision]

    def under_autocast(z: Tensor, logsnr: Tensor, **condition: Any) -> Tensor:
        with torch.autocast(device.type, dtype):
            return call(z, logsnr, **condition)

    return under_autocast
