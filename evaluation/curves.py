"""Draws the loss of a run from its metrics."""

from collections import defaultdict
from pathlib import Path

import torch

from training.metrics import read_metrics
from utils.images import save_figure


def draw_loss_curve(folder: Path) -> Path:
    """Plots metrics.jsonl into loss.png, a curve for each stage. Returns the picture's path.

    The thin line is the loss of every update, the thick one its mean over a fiftieth of the stage.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in read_metrics(folder / "metrics.jsonl"):
        if entry.get("loss") is not None:
            steps = entry.get("num_steps")
            title = str(entry.get("kind", "base model")) if steps is None else f"student {steps}"
            curves[title].append((entry["update"], entry["loss"]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, points in curves.items():
        updates, losses = zip(*points, strict=True)
        (every,) = axes.plot(updates, losses, linewidth=0.5, alpha=0.3)
        width = max(1, len(losses) // 50)
        smooth = torch.tensor(losses).unfold(0, width, 1).mean(1).tolist()
        axes.plot(updates[width - 1 :], smooth, color=every.get_color(), label=title)
    axes.set(xlabel="update of the stage", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    save_figure(path, figure)
    return path
