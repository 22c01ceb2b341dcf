"""The training loop that train.py and distill.py share: updates, metrics, checkpoints, stopping."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.distillation import distillation_loss
from diffusion.gaussian import Denoise, Denoiser, conditioned
from diffusion.losses import LOSS_WEIGHTS, denoising_loss
from diffusion.schedule import Schedule, transition_levels
from utils.command import InputError, Stopped, stop_requests
from utils.config import TrainingConfig
from utils.data import Dataset
from utils.ema import ema_decay_at, update_ema
from utils.images import encode
from utils.metrics import MetricsLog
from utils.progress import progress_bar
from utils.randomness import batch_indices, generator

Losses = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
"""(x, labels, generator) -> loss per example: draws its noise and levels from the generator."""


@dataclass(frozen=True)
class Plan:
    """How a stage is trained. learning_rate: update -> rate; ema_decay None: no average is kept."""

    seed: int
    stage: int
    updates: int
    batch_size: int
    learning_rate: Callable[[int], float]
    gradient_clip: float | None
    checkpoint_every: int
    ema_decay: float | None = None
    horizontal_flip: bool = False
    conditional: bool = False


@dataclass
class Trainee:
    """What changes while training."""

    network: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    update: int = 0


class Metrics(NamedTuple):
    """Of one update. gradient_norm: before clipping."""

    update: int
    loss: float
    gradient_norm: float
    learning_rate: float


def make_optimizer(network: nn.Module, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam (0.9, 0.999) with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
    )


# --- learning rates: update -> rate -------------------------------------------------------------


def warm_up(rate: float, warmup: int, update: int) -> float:
    """Linear from rate / warmup to rate over the first updates, then constant."""
    return rate * min(1.0, (update + 1) / max(1, warmup))


def decay_to_zero(rate: float, updates: int, update: int) -> float:
    """rate (1 - k/K), k = 0 .. K-1: linear to 0 at the end (Salimans & Ho 2022, appendix)."""
    return rate * (1.0 - update / updates)


def base_rate(training: TrainingConfig) -> Callable[[int], float]:
    """The learning rate of a base model: warmed up, then constant or falling to 0 at the end."""

    def rate(update: int) -> float:
        warmed = warm_up(training.learning_rate, training.warmup, update)
        if training.learning_rate_decay == "none":
            return warmed
        return min(warmed, decay_to_zero(training.learning_rate, training.updates, update))

    return rate


# --- what is learnt -----------------------------------------------------------------------------


def base_losses(
    denoiser: Denoiser, schedule: Schedule, weight: str, stratified: bool = False
) -> Losses:
    """The denoising loss in continuous time, t ~ U(0, 1) (Salimans & Ho 2022, algorithm 1).

    stratified: the n-th of B images has t ~ U(n/B, (n+1)/B), in one part of [0, 1] each. The mean
    over the batch has the same expectation and a smaller variance.
    """

    def losses(x: Tensor, labels: Tensor | None, rng: torch.Generator) -> Tensor:
        eps = torch.randn(x.shape, generator=rng, device=x.device)
        t = torch.rand(len(x), generator=rng, device=x.device, dtype=torch.float64)
        if stratified:
            t = (t + torch.arange(len(x), device=x.device)) / len(x)
        return denoising_loss(_bound(denoiser, labels), x, eps, schedule(t), LOSS_WEIGHTS[weight])

    return losses


def student_losses(
    student: Denoiser, teacher: Denoiser, schedule: Schedule, num_steps: int, weight: str
) -> Losses:
    """The student's loss at a random step i ~ U{0 .. N-1} of its N = num_steps (algorithm 2).

    The teacher takes two steps for each of the student's.
    """

    def losses(x: Tensor, labels: Tensor | None, rng: torch.Generator) -> Tensor:
        eps = torch.randn(x.shape, generator=rng, device=x.device)
        i = torch.randint(num_steps, (len(x),), generator=rng, device=x.device)
        levels = transition_levels(schedule, num_steps, i, k=2)
        return distillation_loss(
            _bound(student, labels), _bound(teacher, labels), x, eps, levels, LOSS_WEIGHTS[weight]
        )

    return losses


def _bound(denoiser: Denoiser, labels: Tensor | None) -> Denoise:
    return denoiser if labels is None else conditioned(denoiser, label=labels)


# --- the loop -----------------------------------------------------------------------------------


def updates(trainee: Trainee, plan: Plan, dataset: Dataset, losses: Losses) -> Iterator[Metrics]:
    """Trains from the trainee's update to the plan's last one, yielding after each.

    All that an update draws is a function of (seed, stage, update). Raises InputError where the
    loss or its gradient is no finite number, before the weights are touched.
    """
    parameters = list(trainee.network.parameters())
    device = parameters[0].device
    index_batches = (
        batch_indices(dataset.num_images, plan.batch_size, plan.seed, plan.stage, update)
        for update in range(trainee.update, plan.updates)
    )
    trainee.network.train()
    for images, labels in dataset.batches(index_batches):
        update, rate = trainee.update, plan.learning_rate(trainee.update)
        rng = generator(device, plan.seed, plan.stage, update)
        torch.manual_seed(rng.initial_seed())  # of dropout, which knows no generator
        x = encode(images)
        if plan.horizontal_flip:
            flip = torch.rand(len(x), 1, 1, 1, generator=rng, device=device) < 0.5
            x = torch.where(flip, x.flip(-1), x)

        loss = losses(x, labels if plan.conditional else None, rng).mean()
        trainee.optimizer.zero_grad()
        loss.backward()
        limit = math.inf if plan.gradient_clip is None else plan.gradient_clip
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        # The one time an update waits for the device.
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
        if not math.isfinite(norm_value):
            raise InputError(
                f"stage {plan.stage}, update {update}: the gradient is not finite; "
                "lower the learning rate, or take the loss weight snr_trunc or snr_plus_one"
            )
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        trainee.optimizer.step()
        if trainee.ema is not None and plan.ema_decay is not None:
            update_ema(trainee.ema, trainee.network, ema_decay_at(plan.ema_decay, update))
        trainee.update = update + 1
        yield Metrics(trainee.update, loss_value, norm_value, rate)


def run_stage(
    trainee: Trainee,
    plan: Plan,
    dataset: Dataset,
    losses: Losses,
    *,
    metrics_path: Path,
    save: Callable[[], None],
    draw: Callable[[], None] | None = None,
    title: str,
    **noted: Any,
) -> None:
    """Trains the stage to its end with a progress bar, metrics and checkpoints on the way.

    save is called, then draw, after every plan.checkpoint_every updates and after the last one.
    When the run is asked to stop, save is called and Stopped raised. noted: goes into every line
    of the metrics.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        log = stack.enter_context(MetricsLog(metrics_path, plan.stage, trainee.update))
        bar = stack.enter_context(
            progress_bar(plan.updates, title, "update", initial=trainee.update)
        )
        start = time.perf_counter()
        for metrics in updates(trainee, plan, dataset, losses):
            now = time.perf_counter()
            speed, start = plan.batch_size / (now - start), now
            log.write(
                stage=plan.stage, **noted, **metrics._asdict(), images_per_second=round(speed, 1)
            )
            bar.set_postfix_str(
                f"loss {metrics.loss:.4f}, lr {metrics.learning_rate:.1e}, {speed:.0f} images/s",
                refresh=False,
            )
            bar.update()
            due = trainee.update == plan.updates or trainee.update % plan.checkpoint_every == 0
            if due or stop.requested:
                log.file.flush()
                save()
            if stop.requested:
                raise Stopped(
                    f"stopped and saved at update {trainee.update} of {plan.updates} ({title}); "
                    "run the same command again to go on"
                )
            if due and draw is not None:
                draw()
                start = time.perf_counter()
