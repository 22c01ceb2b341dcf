"""What a run tells of itself: JSON lines for programs, TensorBoard or a tracker for people."""

import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.codec import encode
from training.stage import Stage
from training.tracking import Tracker
from utils.files import make_folder, naming, require_regular_file, write_text
from utils.images import make_grid
from utils.processes import World

BIN_EDGES = tuple(range(-20, 21, 4))  # of the logsnr bins that losses are averaged in
BINNED_EVERY = 100  # updates


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a kill or an accident left unreadable."""
    require_regular_file(path)
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(entry, dict)
            and all(_is_count(entry.get(key)) for key in ("stage", "update"))
            and (entry.get("num_steps") is None or _is_count(entry["num_steps"]))
            and (entry.get("loss") is None or _is_number(entry["loss"]))
        ):
            entries.append(entry)
    return entries


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # not NaN either


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _leave_to_main_thread(failure: threading.ExceptHookArgs) -> None:
    """A hook: TensorBoard's thread keeps its OSError, which the next call raises again."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class MetricsLog:
    """metrics.jsonl and tensorboard/ in a run's folder; the same curves for a tracker if given.

    Begins by dropping what a resumed run will do again: lines of the stage after the update where
    it goes on, those of later stages, and a last line that a kill left half written.
    """

    def __init__(
        self, folder: Path, stage: int, update: int, tracker: Tracker | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes its time to import

        make_folder(folder)
        self.stage, self.tracker = stage, tracker
        self.path, self.board_path = folder / "metrics.jsonl", folder / "tensorboard"
        path = self.path
        self.drawn: set[tuple[int, int]] = set()  # (stage, update) of earlier pictures
        if path.exists():
            entries = read_metrics(path)
            kept = [e for e in entries if (e["stage"], e["update"]) <= (stage, update)]
            self.drawn = {(e["stage"], e["update"]) for e in kept if "samples_mean" in e}
            write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        # Set before the board starts its thread, whose errors are reported by naming.
        self.hook, threading.excepthook = threading.excepthook, _leave_to_main_thread
        self.file = path.open("a")
        with naming(self.board_path):
            self.board = SummaryWriter(
                str(self.board_path / f"stage-{stage}"), purge_step=update + 1
            )

    def write(self, update: int, values: Mapping[str, Any], **where: Any) -> None:
        """One line, of which every number is a curve; where: what else the line says."""
        # JSON knows no NaN and no infinity: they become null
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {**where, "update": update, **finite}
        with naming(self.path):
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
        curves = {key: value for key, value in finite.items() if value is not None}
        with naming(self.board_path):
            for key, value in curves.items():
                self.board.add_scalar(key, value, update)
        if self.tracker is not None:
            self.tracker.log(self.stage, update, curves)

    def picture(self, name: str, image: Tensor, update: int) -> None:
        """A uint8 image (C, H, W) for TensorBoard."""
        with naming(self.board_path):
            self.board.add_image(name, image, update)

    def flush(self) -> None:
        """Everything written so far is in the files."""
        with naming(self.path):
            self.file.flush()
        with naming(self.board_path):
            self.board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with naming(self.path):
                self.file.close()
            with naming(self.board_path):
                self.board.close()
        except OSError:
            if error is None:  # else it has its cause, and that is told
                raise
        finally:
            threading.excepthook = self.hook
            if self.tracker is not None:
                self.tracker.finish()


class LossBins:
    """The mean loss by noise level, gathered on the device and read now and then."""

    def __init__(self, device: torch.device) -> None:
        self.edges = torch.tensor(BIN_EDGES, dtype=torch.float32, device=device)
        self.totals = torch.zeros(2, len(BIN_EDGES) - 1, device=device)

    def add(self, losses: Tensor, logsnr: Tensor) -> None:
        """losses, logsnr: of the same examples, (B,)."""
        bins = torch.bucketize(logsnr.float(), self.edges[1:-1])
        self.totals[0].index_add_(0, bins, losses.detach().float())
        self.totals[1].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def after(self, metrics: "Metrics", stage: Stage, world: World) -> dict[str, float]:
        """Adds an update's losses; returns the means where they are due, else nothing.

        Before a checkpoint and a stop they are due too, as a resumed run begins with none.
        """
        if not metrics.skipped and not stage.of_autoencoder:  # which has one level
            self.add(metrics.losses, metrics.logsnr)
        due = metrics.update % BINNED_EVERY == 0 or stage.saves_at(metrics.update)
        due = due or metrics.stop  # the same in all processes
        return self.read(world) if due else {}

    def read(self, world: World) -> dict[str, float]:
        """The means since the last reading, by the lower edge of the bin; none of empty bins.

        Over the examples of all processes, which have to call it together.
        """
        sums, counts = world.sum(self.totals).tolist()
        self.totals.zero_()
        return {
            f"loss_logsnr_{edge}": total / count
            for edge, total, count in zip(BIN_EDGES[:-1], sums, counts, strict=True)
            if count
        }


def sample_statistics(images: Tensor) -> dict[str, float]:
    """Mean, variance and share of clipped pixels of uint8 images, in the model's range."""
    x = encode(images)
    return {
        "samples_mean": x.mean().item(),
        "samples_variance": x.var().item(),
        "samples_clipped": ((images == 0) | (images == 255)).float().mean().item(),
    }


class Metrics(NamedTuple):
    """What is known of one update.

    gradient_norm: before clipping. skipped: the gradient was not finite, so the weights are as
    they were. stop: some process was asked to stop. losses, logsnr: of this process's examples,
    (B,) each, on the device.
    """

    update: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    stop: bool
    losses: Tensor
    logsnr: Tensor


class Monitor:
    """Reports each update: a line of metrics and a tick of the bar."""

    def __init__(self, log: MetricsLog, bar: Any, stage: Stage) -> None:
        self.log, self.bar, self.stage = log, bar, stage
        self.where: dict[str, Any] = {"stage": stage.number}
        if stage.of_autoencoder:
            self.where["kind"] = "autoencoder"
        if stage.num_steps is not None:
            self.where["num_steps"] = stage.num_steps
        self.last = time.perf_counter()

    def after(self, metrics: Metrics, by_level: dict[str, float]) -> None:
        """Notes one update. by_level: losses by noise level, see LossBins.read; may be empty."""
        now = time.perf_counter()
        speed, self.last = self.stage.batch_size / (now - self.last), now
        values: dict[str, float] = {
            "loss": metrics.loss,
            "gradient_norm": metrics.gradient_norm,
            "learning_rate": metrics.learning_rate,
            "skipped": metrics.skipped,
            "images_per_second": round(speed, 1),
        } | by_level
        self.log.write(metrics.update, values, **self.where)
        text = f"loss {metrics.loss:.4f}, lr {metrics.learning_rate:.1e}, {speed:.0f} images/s"
        rate = self.bar.format_dict["rate"]
        if self.stage.updates_after and rate:
            left = self.stage.updates - metrics.update + self.stage.updates_after
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
        return (self.stage.number, update) in self.log.drawn
