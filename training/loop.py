"""The training loop that train.py and distill.py share: updates, metrics, checkpoints, stopping."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.distillation import distillation_loss
from diffusion.gaussian import Denoise, Denoiser, conditioned
from diffusion.losses import LOSS_WEIGHTS, denoising_loss
from diffusion.schedule import Schedule, transition_levels
from pipeline.config import TrainingConfig
from pipeline.data import Dataset
from training.average import ema_decay_at, update_ema
from training.metrics import BINNED_EVERY, LossBins, MetricsLog, sample_statistics
from utils.command import DataError, InputError, Stopped, StopRequest, stop_requests, warn
from utils.images import encode, make_grid
from utils.processes import World
from utils.progress import progress_bar
from utils.randomness import batch_indices, generator

SKIPS_IN_A_ROW = 20  # fp16 may begin with some, until its scale fits

Drawn = tuple[Tensor, ...]


class Objective(NamedTuple):
    """What an update learns.

    draw: (generator, shape of the images) -> all that is random, for the whole global batch, each
    tensor with a row an image. loss: (x, labels, *drawn) -> loss per example, of any rows of it.
    logsnr: (*drawn) -> the noise level of each example.
    """

    draw: Callable[[torch.Generator, torch.Size], Drawn]
    loss: Callable[..., Tensor]
    logsnr: Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    batch_size: of all processes and steps of accumulation together. learning_rate: update -> rate.
    updates_after: of the stages to come, for the time left. ema_decay None: no average is kept.
    """

    seed: int
    stage: int
    updates: int
    batch_size: int
    learning_rate: Callable[[int], float]
    gradient_clip: float | None
    checkpoint_every: int
    accumulate: int = 1
    updates_after: int = 0
    ema_decay: float | None = None
    horizontal_flip: bool = False
    conditional: bool = False
    noted: dict[str, Any] = field(default_factory=dict)

    def saves_at(self, update: int) -> bool:
        """Whether a checkpoint is due after so many updates."""
        return update == self.updates or (update > 0 and update % self.checkpoint_every == 0)


@dataclass
class Trainee:
    """What changes while training.

    called: the network as the loss calls it, wrapped. scaler: of the loss, for fp16; else idle.
    """

    network: nn.Module
    called: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    update: int = 0

    def synchronised(self, now: bool) -> AbstractContextManager[Any]:
        """Whether a backward pass in this context averages gradients over the processes."""
        if now or not isinstance(self.called, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.called.no_sync()  # type: ignore[no-any-return]


class Metrics(NamedTuple):
    """Of one update.

    gradient_norm: before clipping. skipped: it was not finite, so the weights are as they were.
    stop: some process was asked to stop. losses, logsnr: of this process's examples, on the device.
    """

    update: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    stop: bool
    losses: Tensor
    logsnr: Tensor


class Callbacks(NamedTuple):
    """What a stage does when a checkpoint is due, after every plan.checkpoint_every updates.

    save: writes the checkpoint; called by one process. draw: writes a picture and returns its
    images; called by all, and first of all where a kill came between a checkpoint and its picture.
    """

    save: Callable[[], None]
    draw: Callable[[], Tensor] | None = None


def make_optimizer(network: nn.Module, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam (0.9, 0.999) with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
    )


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Puts the optimiser where it was saved, its moments in the memory format of the parameters.

    They may have been saved on another kind of device, with another format, and a fused Adam goes
    through both as they lie in memory. The hyperparameters stay the optimiser's own. Raises
    ValueError for moments of other parameters.
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


def base_objective(
    denoiser: Denoiser,
    schedule: Schedule,
    weight: str,
    stratified: bool = False,
    label_dropout: float = 0.0,
) -> Objective:
    """The denoising loss in continuous time, t ~ U(0, 1) (Salimans & Ho 2022, algorithm 1).

    stratified: the n-th of B images has t ~ U(n/B, (n+1)/B), in one part of [0, 1] each. The mean
    over the batch has the same expectation and a smaller variance. label_dropout: the share of
    images whose class is kept from the network, for classifier-free guidance.
    """

    def draw(rng: torch.Generator, shape: torch.Size) -> Drawn:
        eps = torch.randn(shape, generator=rng, device=rng.device)
        t = torch.rand(shape[0], generator=rng, device=rng.device, dtype=torch.float64)
        if stratified:
            t = (t + torch.arange(shape[0], device=rng.device)) / shape[0]
        if not label_dropout:
            return eps, t
        return eps, t, torch.rand(shape[0], generator=rng, device=rng.device) < label_dropout

    def loss(x: Tensor, labels: Tensor | None, eps: Tensor, t: Tensor, *dropped: Tensor) -> Tensor:
        if labels is not None and dropped:
            labels = labels.masked_fill(dropped[0], -1)
        return denoising_loss(_bound(denoiser, labels), x, eps, schedule(t), LOSS_WEIGHTS[weight])

    return Objective(draw, loss, lambda eps, t, *dropped: schedule(t))


def student_objective(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    num_steps: int,
    weight: str,
    time_exponent: float = 1.0,
) -> Objective:
    """The student's loss at a random step i of its N = num_steps (Salimans & Ho 2022, algorithm 2).

    The teacher takes two steps for each of the student's. i = floor(N t), t = u^(1 / p) with
    u ~ U(0, 1) and p = time_exponent, so t has the density p t^(p-1): 1 is the paper's uniform i.
    """

    def draw(rng: torch.Generator, shape: torch.Size) -> Drawn:
        eps = torch.randn(shape, generator=rng, device=rng.device)
        u = torch.rand(shape[0], generator=rng, device=rng.device, dtype=torch.float64)
        i = (num_steps * u ** (1 / time_exponent)).long()
        return eps, i.clamp(max=num_steps - 1)  # as a power of u < 1 may be rounded to 1

    def loss(x: Tensor, labels: Tensor | None, eps: Tensor, i: Tensor) -> Tensor:
        levels = transition_levels(schedule, num_steps, i, k=2)
        return distillation_loss(
            _bound(student, labels), _bound(teacher, labels), x, eps, levels, LOSS_WEIGHTS[weight]
        )

    def logsnr(eps: Tensor, i: Tensor) -> Tensor:
        return transition_levels(schedule, num_steps, i, k=1)[0]

    return Objective(draw, loss, logsnr)


def _bound(denoiser: Denoiser, labels: Tensor | None) -> Denoise:
    return denoiser if labels is None else conditioned(denoiser, label=labels)


# --- the loop -----------------------------------------------------------------------------------


def updates(
    trainee: Trainee,
    plan: Plan,
    dataset: Dataset,
    objective: Objective,
    world: World,
    stop: StopRequest | None = None,
) -> Iterator[Metrics]:
    """Trains from the trainee's update to the plan's last one, yielding after each.

    All that an update draws is a function of (seed, stage, update), drawn for the global batch of
    which each process, and each step of accumulation, takes its rows: the gradient is that of one
    process and one step, up to rounding. An update whose gradient is no finite number is skipped,
    in all processes alike; SKIPS_IN_A_ROW of them raise InputError.
    """
    parameters = list(trainee.network.parameters())
    limit = math.inf if plan.gradient_clip is None else plan.gradient_clip
    rows = own_rows(plan.batch_size, plan.accumulate, world)
    own = slice(rows[0].start, rows[-1].stop)
    index_batches = (
        batch_indices(dataset.num_images, plan.batch_size, plan.seed, plan.stage, update)[own]
        for update in range(trainee.update, plan.updates)
    )
    skips = 0
    trainee.network.train()
    stop = stop or StopRequest()
    for images, labels in stop.between(dataset.batches(index_batches)):
        update, rate = trainee.update, plan.learning_rate(trainee.update)
        label = labels if plan.conditional else None
        losses, logsnr = backward(trainee, plan, objective, world, images, label)
        trainee.scaler.unscale_(trainee.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        stops = torch.tensor(float(stop.requested), device=world.device)
        # What an update tells comes from the device at once, not figure by figure.
        reduced = torch.stack([losses.sum() / plan.batch_size, stops, norm / world.size])
        loss_value, num_stops, norm_value = world.sum(reduced).tolist()
        finite = math.isfinite(norm_value)
        if finite:
            skips = 0
            for group in trainee.optimizer.param_groups:
                group["lr"] = rate
            trainee.scaler.step(trainee.optimizer)
            if trainee.ema is not None and plan.ema_decay is not None:
                update_ema(trainee.ema, trainee.network, ema_decay_at(plan.ema_decay, update))
        else:
            skips += 1
            _explain_skip(plan, update, skips, logsnr)
        trainee.scaler.update()
        trainee.update = update + 1
        yield Metrics(
            update=trainee.update,
            loss=loss_value,
            gradient_norm=norm_value,
            learning_rate=rate,
            skipped=not finite,
            stop=num_stops > 0,
            losses=losses,
            logsnr=logsnr,
        )


def backward(
    trainee: Trainee,
    plan: Plan,
    objective: Objective,
    world: World,
    images: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Puts the gradient of the global batch's mean loss where the optimiser looks for it.

    images, labels: this process's rows. Returns their losses and noise levels, (B,) each.
    """
    rows = own_rows(plan.batch_size, plan.accumulate, world)
    first = rows[0].start
    rng = generator(world.device, plan.seed, plan.stage, trainee.update)
    drawn = objective.draw(rng, torch.Size([plan.batch_size, *images.shape[1:]]))
    flip = torch.rand(plan.batch_size, 1, 1, 1, generator=rng, device=world.device) < 0.5
    # Dropout knows no generator: its own numbers for each process.
    torch.manual_seed(generator("cpu", rng.initial_seed(), world.rank).initial_seed())

    trainee.optimizer.zero_grad()
    losses = []
    for row in rows:
        local = slice(row.start - first, row.stop - first)
        x = encode(images[local])
        if plan.horizontal_flip:
            x = torch.where(flip[row], x.flip(-1), x)
        label = None if labels is None else labels[local]
        with trainee.synchronised(row is rows[-1]):
            loss = objective.loss(x, label, *(tensor[row] for tensor in drawn))
            # times the size, as gradients are averaged over the processes
            share = loss.sum() / plan.batch_size * world.size
            trainee.scaler.scale(share).backward()
        losses.append(loss.detach())
    own = slice(first, rows[-1].stop)
    return torch.cat(losses), objective.logsnr(*drawn)[own]


def _explain_skip(plan: Plan, update: int, skips: int, logsnr: Tensor) -> None:
    """Warns of a skipped update, or ends the run where they will not end."""
    where = f"stage {plan.stage}, update {update}: the gradient is not finite"
    if skips >= SKIPS_IN_A_ROW:
        raise InputError(
            f"{where}, for the {skips}th time in a row; begin anew (--restart, or another "
            "--output) with a lower learning rate, the loss weight snr_trunc or snr_plus_one, or "
            "precision fp32"
        )
    low, high = logsnr.min().item(), logsnr.max().item()
    warn(f"{where}; skipped (logsnr between {low:.1f} and {high:.1f})")


def own_rows(batch_size: int, accumulate: int, world: World) -> list[slice]:
    """The rows of the global batch that this process has, one slice a step of accumulation."""
    parts = world.size * accumulate
    if parts > batch_size:
        raise InputError(
            f"batch_size: {batch_size} cannot be shared by {world.size} processes of "
            f"{accumulate} steps of accumulation each; take at least {parts}"
        )
    edges = [batch_size * n // parts for n in range(parts + 1)]
    first = world.rank * accumulate
    return [slice(edges[n], edges[n + 1]) for n in range(first, first + accumulate)]


def run_stage(
    trainee: Trainee,
    plan: Plan,
    dataset: Dataset,
    objective: Objective,
    world: World,
    folder: Path,
    callbacks: Callbacks,
    title: str,
) -> None:
    """Trains the stage to its end with a progress bar, metrics and checkpoints on the way.

    folder: of metrics.jsonl and tensorboard/. When a process is asked to stop, a checkpoint is
    saved and Stopped raised in all.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        monitor = None
        if world.leads:
            log = stack.enter_context(MetricsLog(folder, plan.stage, trainee.update))
            bar = stack.enter_context(progress_bar(plan.updates, title, "update", trainee.update))
            monitor = Monitor(log, bar, plan, world.device)

        def show() -> None:
            if callbacks.draw is None:
                return
            stop.urgent = True  # all is saved, and a picture takes its time
            images = callbacks.draw()
            if monitor is not None:
                monitor.show(images, trainee.update)
            stop.urgent = False

        # A kill may have come between a checkpoint and its picture.
        if plan.saves_at(trainee.update) and world.any(
            monitor is not None and not monitor.shown(trainee.update)
        ):
            show()
        first, finite = trainee.update, True
        try:
            for metrics in updates(trainee, plan, dataset, objective, world, stop):
                stopping, finite = metrics.stop, not metrics.skipped
                # Weights that give no finite gradient are no place to go on from.
                last = trainee.update == plan.updates
                due = plan.saves_at(trainee.update) and (last or finite)
                if monitor is not None:
                    monitor.after(metrics)
                if due or stopping:
                    if monitor is not None:
                        monitor.log.flush()
                        callbacks.save()
                    stopping = world.any(stop.requested)
                if due and not stopping:
                    show()
                if stopping:
                    break
        except DataError as error:
            saved = trainee.update > first and finite
            if monitor is not None and saved:
                monitor.log.flush()
                callbacks.save()
            done = f"{'saved' if saved else 'ended'} at update {trainee.update} of {plan.updates}"
            if stop.requested:
                raise Stopped(f"stopped and {done} ({title}); {error}") from None
            raise InputError(f"{error}; {done} ({title})") from None
    if world.any(stop.requested):  # one that came at the very end too
        raise Stopped(f"stopped and saved at update {trainee.update} of {plan.updates} ({title})")


class Monitor:
    """What an update is told of: a line of metrics, a tick of the bar, the losses' bins."""

    def __init__(self, log: MetricsLog, bar: Any, plan: Plan, device: torch.device) -> None:
        self.log, self.bar, self.plan = log, bar, plan
        self.where = {"stage": plan.stage, **plan.noted}
        self.bins = LossBins(device)
        self.last = time.perf_counter()

    def after(self, metrics: Metrics) -> None:
        """Notes one update."""
        now = time.perf_counter()
        speed, self.last = self.plan.batch_size / (now - self.last), now
        values = {
            "loss": metrics.loss,
            "gradient_norm": metrics.gradient_norm,
            "learning_rate": metrics.learning_rate,
            "skipped": metrics.skipped,
            "images_per_second": round(speed, 1),
        }
        if not metrics.skipped:
            self.bins.add(metrics.losses, metrics.logsnr)
        if metrics.update % BINNED_EVERY == 0 or self.plan.saves_at(metrics.update):
            values |= self.bins.read()  # before a save too, as a resumed run begins with none
        self.log.write(metrics.update, values, **self.where)
        text = f"loss {metrics.loss:.4f}, lr {metrics.learning_rate:.1e}, {speed:.0f} images/s"
        rate = self.bar.format_dict["rate"]
        if self.plan.updates_after and rate:
            left = self.plan.updates - metrics.update + self.plan.updates_after
            text += f", whole ladder {self.bar.format_interval(left / rate)}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def show(self, images: Tensor, update: int) -> None:
        """Notes what was drawn: uint8 images (B, C, H, W)."""
        self.log.write(update, sample_statistics(images), **self.where)
        self.log.flush()
        self.log.picture("samples", make_grid(images), update)
        self.last = time.perf_counter()

    def shown(self, update: int) -> bool:
        """Whether an earlier run, that this one goes on from, has noted what was drawn then."""
        return (self.plan.stage, update) in self.log.drawn
