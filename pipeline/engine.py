"""How networks are run fast: autocast, compilation, TF32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.sections import EngineConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def allow_tf32(engine: EngineConfig) -> None:
    """Allows or forbids TF32 for float32 products on GPUs. Has no effect on other devices."""
    torch.set_float32_matmul_precision("high" if engine.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = engine.tf32


def sampling_engine(engine: EngineConfig, device: torch.device) -> EngineConfig:
    """Returns how to run a checkpoint for sampling: eagerly, in float32 on a CPU.

    On an accelerator in the precision of its config. A compilation takes longer than most sampling.
    A config with cpu_sampling is followed in everything.
    """
    if engine.cpu_sampling:
        return engine
    precision = "fp32" if device.type == "cpu" else engine.precision
    return engine.model_copy(update={"precision": precision, "compile": False})


def asked_engine(
    engine: EngineConfig, device: torch.device, precision: str | None, compiled: bool
) -> EngineConfig:
    """Returns sampling_engine's engine with the command line's precision and compilation.

    It sets cpu_sampling, so that sampling_engine returns it unchanged.
    """
    default = sampling_engine(engine, device)
    asked = {
        "precision": precision or default.precision,
        "compile": compiled or default.compile,
        "cpu_sampling": True,
    }
    return default.model_copy(update=asked)


def accelerated(
    network: nn.Module, engine: EngineConfig, device: torch.device
) -> Callable[..., Tensor]:
    """Returns the network, compiled and under autocast as the engine says.

    Only the network runs in reduced precision: a Denoiser casts its output back to the type of z,
    so that schedule, decoding, target and loss are in float32.
    """
    call: Callable[..., Tensor] = network
    if engine.compile:  # one graph for each batch size: faster than a dynamic one
        call = torch.compile(network, dynamic=False)
    if engine.precision == "fp32":
        return call

    def under_autocast(z: Tensor, logsnr: Tensor, **condition: Any) -> Tensor:
        with autocast(engine, device):
            return call(z, logsnr, **condition)

    return under_autocast


def autocast(engine: EngineConfig, device: torch.device) -> torch.autocast:
    """Returns a context in which networks run in the engine's precision."""
    return torch.autocast(
        device.type, AUTOCAST.get(engine.precision), enabled=engine.precision in AUTOCAST
    )
