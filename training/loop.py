"""The training loop of every stage: updates, metrics, checkpoints, stopping."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.objectives import Objective, Tensors
from pipeline.codec import PIXELS, Codec
from pipeline.data import Dataset
from training.metrics import LossBins, Metrics, MetricsLog, Monitor
from training.recording import Recording, Work
from training.stage import Stage
from training.tracking import Tracker
from training.trainee import Trainee
from utils.command import DataError, InputError, Stopped, StopRequest, stop_requests, warn
from utils.processes import World
from utils.progress import progress_bar
from utils.randomness import batch_indices, generator

SKIPS_IN_A_ROW = 20  # fp16 may begin with some, until its scale fits


class Callbacks(NamedTuple):
    """What happens when a checkpoint is due.

    save: writes the checkpoint; called by one process. draw: writes a picture and returns its
    images; called by all processes.
    """

    save: Callable[[], None]
    draw: Callable[[], Tensor] | None = None


def train_updates(
    trainee: Trainee,
    stage: Stage,
    dataset: Dataset,
    objective: Objective,
    world: World,
    stop: StopRequest | None = None,
    codec: Codec = PIXELS,
) -> Iterator[Metrics]:
    """Trains from the trainee's update to the stage's last one, yielding after each.

    All that an update draws is a function of (seed, stage, update), drawn for the global batch, of
    which each process and each step of accumulation takes its rows: without dropout and the loss
    energy, the gradient is that of one process and one step, up to rounding. An update whose
    gradient is not finite is skipped, in all processes alike; SKIPS_IN_A_ROW of them raise
    InputError.
    """
    limit = math.inf if stage.gradient_clip is None else stage.gradient_clip
    rows = rows_of_process(stage.batch_size, stage.accumulate, world)
    own = slice(rows[0].start, rows[-1].stop)
    index_batches = (
        batch_indices(dataset.num_images, stage.batch_size, stage.seed, stage.number, update)[own]
        for update in range(trainee.update, stage.updates)
    )
    skips, step = 0, step_of(trainee, stage, objective, world)
    trainee.network.train()
    stop = stop or StopRequest()
    for images, labels in stop.between(dataset.batches(index_batches)):
        rate = stage.rate_at(trainee.update)
        condition = {"label": labels} if stage.conditional else {}
        losses, logsnr = backward(
            trainee, stage, objective.draw, step, world, images, condition, codec
        )
        trainee.scaler.unscale_(trainee.optimizer)
        norms = [nn.utils.clip_grad_norm_(group, limit) for group in trainee.parameters]
        stops = torch.tensor(float(stop.requested), device=world.device)
        # One transfer from the device for all figures of an update.
        norms = [norm / world.size for norm in norms]
        reduced = torch.stack([losses.sum() / stage.batch_size, stops, *norms])
        loss_value, num_stops, *norm_values = world.sum(reduced).tolist()
        finite = all(map(math.isfinite, norm_values))
        if finite:
            skips = 0
            trainee.step(stage, rate)
        else:
            skips += 1
            _explain_skip(stage, trainee.update, skips, logsnr)
        trainee.scaler.update()
        trainee.update += 1
        yield Metrics(
            update=trainee.update,
            loss=loss_value,
            gradient_norm=norm_values[0],
            learning_rate=rate,
            skipped=not finite,
            stop=num_stops > 0,
            losses=losses,
            logsnr=logsnr,
        )


def step_of(trainee: Trainee, stage: Stage, objective: Objective, world: World) -> Work:
    """Returns (images, condition, what is drawn) -> losses and noise levels, (B,) each.

    It adds the gradient of their share in the global batch's mean loss to that of the parameters.
    """

    def step(images: Tensors, condition: Tensors, drawn: Tensors) -> tuple[Tensor, ...]:
        loss, logsnr = objective.loss(images["x"], condition, drawn)
        # Times the number of processes, over which DistributedDataParallel averages.
        share = loss.sum() / stage.batch_size * world.size
        trainee.scaler.scale(share).backward()
        return loss.detach(), logsnr

    if not trainee.recorded:
        return step
    return Recording(step, [p for group in trainee.parameters for p in group])


def backward(
    trainee: Trainee,
    stage: Stage,
    draw: Callable[[torch.Generator, torch.Size], Tensors],
    step: Work,
    world: World,
    images: Tensor,
    condition: Tensors,
    codec: Codec = PIXELS,
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradient of the global batch's mean loss in the parameters.

    images, condition: this process's rows. Returns their losses and noise levels, (B,) each.
    """
    rows = rows_of_process(stage.batch_size, stage.accumulate, world)
    first = rows[0].start
    rng = generator(world.device, stage.seed, stage.number, trainee.update)
    shape = codec.shape(images.shape[-1], images.shape[1])
    drawn = draw(rng, torch.Size([stage.batch_size, *shape]))
    flip = torch.rand(stage.batch_size, 1, 1, 1, generator=rng, device=world.device) < 0.5
    # Dropout takes no generator: the default one is seeded for each process.
    torch.manual_seed(generator("cpu", rng.initial_seed(), world.rank).initial_seed())

    trainee.optimizer.zero_grad(set_to_none=not trainee.recorded)
    results = []
    for row in rows:
        local = slice(row.start - first, row.stop - first)
        pixels = images[local]
        if stage.horizontal_flip:
            pixels = torch.where(flip[row], pixels.flip(-1), pixels)
        x = codec.encode(pixels)
        own_condition = {name: value[local] for name, value in condition.items()}
        own_drawn = {name: value[row] for name, value in drawn.items()}
        with trainee.synchronised(row is rows[-1]):
            results.append(step({"x": x}, own_condition, own_drawn))
    losses, levels = zip(*results, strict=True)
    return torch.cat(losses), torch.cat(levels)


def _explain_skip(stage: Stage, update: int, skips: int, logsnr: Tensor) -> None:
    """Warns of a skipped update; raises InputError after SKIPS_IN_A_ROW of them."""
    where = f"stage {stage.number}, update {update}: the gradient is not finite"
    if skips >= SKIPS_IN_A_ROW:
        raise InputError(
            f"{where}, for the {skips}th time in a row; begin anew (--restart, or another "
            "--output) with a lower learning rate, the loss weight snr_trunc or snr_plus_one, or "
            "precision fp32"
        )
    low, high = logsnr.min().item(), logsnr.max().item()
    warn(f"{where}; skipped (logsnr between {low:.1f} and {high:.1f})")


def rows_of_process(batch_size: int, accumulate: int, world: World) -> list[slice]:
    """The rows of the global batch that this process computes, a slice for each accumulation step.

    Raises InputError if there are too few for all processes.
    """
    parts = world.size * accumulate
    if parts > batch_size:
        raise InputError(
            f"batch_size: {batch_size} cannot be shared by {world.size} processes of "
            f"{accumulate} steps of accumulation each; take at least {parts}"
        )
    edges = [batch_size * n // parts for n in range(parts + 1)]
    first = world.rank * accumulate
    return [slice(edges[n], edges[n + 1]) for n in range(first, first + accumulate)]


class Written(NamedTuple):
    """What a stage leaves behind. monitor: None in processes that do not write."""

    callbacks: Callbacks
    stop: StopRequest
    monitor: Monitor | None

    def save(self) -> None:
        """Writes a checkpoint, and the metrics up to it."""
        if self.monitor is not None:
            self.monitor.log.flush()
            self.callbacks.save()

    def show(self, update: int) -> None:
        """Draws the picture that belongs to the checkpoint, in all processes."""
        if self.callbacks.draw is None:
            return
        self.stop.urgent = True  # all is saved, and a picture takes its time
        images = self.callbacks.draw()
        if self.monitor is not None:
            self.monitor.show(images, update)
        self.stop.urgent = False


def run_stage(
    trainee: Trainee,
    stage: Stage,
    dataset: Dataset,
    objective: Objective,
    world: World,
    folder: Path,
    callbacks: Callbacks,
    title: str,
    codec: Codec = PIXELS,
    tracker: Tracker | None = None,
) -> None:
    """Trains the stage to its end with a progress bar, metrics and checkpoints on the way.

    folder: of metrics.jsonl and tensorboard/; tracker: gets the same curves. When a process is
    asked to stop, a checkpoint is saved and Stopped raised in all.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        monitor = None
        if world.leads:
            log = stack.enter_context(MetricsLog(folder, stage.number, trainee.update, tracker))
            bar = stack.enter_context(progress_bar(stage.updates, title, "update", trainee.update))
            monitor = Monitor(log, bar, stage)

        written = Written(callbacks, stop, monitor)
        # A kill may have come between a checkpoint and its picture.
        unseen = monitor is not None and not monitor.shown(trainee.update)
        if stage.saves_at(trainee.update) and world.any(unseen):
            written.show(trainee.update)
        first, finite, bins = trainee.update, True, LossBins(world.device)
        updates = train_updates(trainee, stage, dataset, objective, world, stop, codec)
        try:
            for metrics in updates:
                stopping, finite = metrics.stop, not metrics.skipped
                # Weights that give no finite gradient are no place to go on from; a stop saves all
                # the same, because they are those from before the skipped updates.
                usable = finite or trainee.update == stage.updates
                due = usable and stage.saves_at(trainee.update)
                by_level = bins.after(metrics, stage, world)
                if monitor is not None:
                    monitor.after(metrics, by_level)
                if due or stopping:
                    written.save()
                    stopping = world.any(stop.requested)
                if due and not stopping:
                    written.show(trainee.update)
                if stopping:
                    break
        except DataError as error:
            # Where another process cannot go on, the leader is still waiting for it.
            saved = world.leads and trainee.update > first and finite
            if saved:
                written.save()
            done = f"{'saved' if saved else 'ended'} at update {trainee.update} of {stage.updates}"
            if stop.requested:
                raise Stopped(f"stopped and {done} ({title}); {error}") from None
            raise InputError(f"{error}; {done} ({title})") from None
    if world.any(stop.requested):  # one that came at the very end too
        raise Stopped(f"stopped and saved at update {trainee.update} of {stage.updates} ({title})")
