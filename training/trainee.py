"""What changes while training: weights, their averages, the optimiser."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.critic import Critic
from pipeline.checkpoint import Checkpoint
from pipeline.network import load_weights
from pipeline.sections import EngineConfig
from training.stage import Stage
from utils.command import InputError
from utils.processes import World

CRITICS_ADAM = {"lr": 1e-3, "betas": (0.5, 0.99)}


@dataclass
class Trainee:
    """A network in training.

    called: the network as the loss calls it, wrapped for several processes. ema: the average that
    is evaluated, or None. walker: the average that walks a student's paths, or None. initial: the
    weights that training pulls back to (Stage.pull), or None. critic: of an adversarial loss, or
    None; called_critic: as its own loss calls it. scaler: of the loss, for fp16. recorded: whether
    its updates are CUDA graphs (training/recording.py).
    """

    network: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None = None
    walker: nn.Module | None = None
    initial: list[Tensor] | None = None
    critic: Critic | None = None
    called_critic: nn.Module | None = None
    recorded: bool = False
    update: int = 0

    def state(self, resumable: bool = True) -> dict[str, Any]:
        """The entries of a checkpoint that say how far training has come.

        resumable: with all that restore reads, not only what a finished network is used for.
        """
        used = {
            "update": self.update,
            "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        if not resumable:
            return used
        return {
            **used,
            "walker": None if self.walker is None else self.walker.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, stored: Checkpoint, where: Path) -> None:
        """Goes back to where the checkpoint was saved. where: its file, for errors."""
        load_weights(self.network, stored.model, where)
        if self.ema is not None:
            load_weights(self.ema, stored.weights, where)
        if self.walker is not None:
            load_weights(self.walker, stored.walker or {}, where)
        if self.critic is not None:
            load_weights(self.critic, stored.critic or {}, where)
        try:
            load_optimizer(self.optimizer, stored.optimizer or {})
        except ValueError as error:
            raise InputError(f"{where}: optimizer: {error}") from None
        if stored.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(stored.scaler)
        self.update = stored.update

    def step(self, stage: Stage, rate: float) -> None:
        """One step of the optimiser, then of the averages."""
        self.optimizer.param_groups[0]["lr"] = rate  # a critic keeps its own
        self.scaler.step(self.optimizer)
        if self.initial is not None:  # decoupled decay towards the initial weights
            with torch.no_grad():
                weights = [p.data for p in self.network.parameters()]
                torch._foreach_lerp_(weights, self.initial, rate * stage.pull)
        if self.ema is not None and stage.ema_decay is not None:
            update_ema(self.ema, self.network, ema_decay_at(stage.ema_decay, self.update))
        if self.walker is not None and stage.walker_decay is not None:
            update_ema(self.walker, self.network, stage.walker_decay)

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Those of the network; those of the critic, if there is one."""
        trained = [self.network] if self.critic is None else [self.network, self.critic]
        return [list(module.parameters()) for module in trained]

    @contextmanager
    def synchronised(self, now: bool) -> Iterator[None]:
        """A context in which a backward pass averages gradients over processes only if now."""
        with ExitStack() as stack:
            for called in (self.called, self.called_critic):
                if isinstance(called, nn.parallel.DistributedDataParallel) and not now:
                    stack.enter_context(called.no_sync())
            yield


def make_trainee(
    network: nn.Module,
    stage: Stage,
    world: World,
    engine: EngineConfig | None = None,
    critic: Critic | None = None,
) -> Trainee:
    """The network at the beginning of a stage; its averages begin as its weights.

    critic: of an adversarial loss, trained beside it.
    """
    engine = engine or EngineConfig()

    def average() -> nn.Module:
        return copy.deepcopy(network).requires_grad_(False).eval()

    initial = [p.detach().clone() for p in network.parameters()] if stage.pull else None
    return Trainee(
        network=network,
        called=world.wrap(network),
        optimizer=make_optimizer(network, stage.weight_decay, critic),
        scaler=torch.amp.GradScaler(world.device.type, enabled=engine.precision == "fp16"),
        ema=None if stage.ema_decay is None else average(),
        walker=None if stage.walker_decay is None else average(),
        initial=initial,
        critic=critic,
        called_critic=None if critic is None else world.wrap(critic),
        recorded=engine.cuda_graphs and world.device.type == "cuda" and world.size == 1,
    )


# --- optimiser and averages -----------------------------------------------------------------------


def make_optimizer(
    network: nn.Module, weight_decay: float = 0.0, critic: Critic | None = None
) -> torch.optim.Optimizer:
    """Adam (0.9, 0.999) with decoupled weight decay (Loshchilov & Hutter 2019).

    critic: learns at a rate of its own, which stays the same, with a shorter memory, as what it
    learns changes all the time.
    """
    groups: list[dict[str, Any]] = [
        {"params": network.parameters(), "lr": 0.0, "weight_decay": weight_decay}
    ]
    if critic is not None:
        groups.append({"params": critic.parameters(), **CRITICS_ADAM})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Restores the optimiser, its moments in the memory format of the parameters.

    They may have been saved on another kind of device with another format, and a fused Adam reads
    parameters and moments in the order in which they lie in memory. The hyperparameters stay the
    optimiser's own. Raises ValueError for moments of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    moments = stored.get("state")
    if not isinstance(moments, dict) or (moments and moments.keys() != set(range(len(shapes)))):
        raise ValueError(f"not the state of {len(shapes)} parameters")
    for n, state in moments.items():
        wanted = {"step": torch.Size([]), "exp_avg": shapes[n], "exp_avg_sq": shapes[n]}
        if not isinstance(state, dict) or wanted != {
            name: value.shape for name, value in state.items() if isinstance(value, Tensor)
        }:
            raise ValueError(f"not the moments of parameter {n}, of shape {tuple(shapes[n])}")
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def ema_decay_at(decay: float, update: int) -> float:
    """min(decay, (1 + n) / (10 + n)) after n earlier updates: short runs forget how they began."""
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """parameters: ema <- decay ema + (1 - decay) network; buffers are copied as they are."""
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1.0 - decay)
    for averaged, current in zip(ema.buffers(), network.buffers(), strict=True):
        averaged.copy_(current)
