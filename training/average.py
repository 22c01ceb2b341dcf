"""The exponential moving average of a network's parameters."""

import torch
from torch import nn


def ema_decay_at(decay: float, update: int) -> float:
    """min(decay, (1 + n) / (10 + n)) after n earlier updates: short runs forget how they began."""
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """parameters: ema <- decay ema + (1 - decay) network; buffers are copied as they are."""
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1.0 - decay)
    for averaged, current in zip(ema.buffers(), network.buffers(), strict=True):
        averaged.copy_(current)
