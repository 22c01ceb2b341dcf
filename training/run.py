"""A run, and what one of its trainings is told to do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffusion.objectives import Objective
from pipeline.checkpoint import Checkpoint
from pipeline.codec import Codec, open_codec
from pipeline.config import Config
from pipeline.data import Dataset
from training.stage import Stage
from training.trainee import Trainee
from utils.processes import World


@dataclass(frozen=True)
class Run:
    """What all stages of a run share. name: of its config; output: its folder."""

    config: Config
    name: str
    output: Path
    world: World
    dataset: Dataset

    @property
    def codec(self) -> Codec:
        """What maps images to what the model works on, and back."""
        return open_codec(self.config.codec, self.world.device)


Draw = Callable[[Run, Trainee, Checkpoint], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """What is trained: what it learns, and what is drawn beside a checkpoint.

    objective: (run, stage, trainee, start, teacher) -> what it learns. draw: (run, trainee,
    checkpoint) -> a picture (C, H, W), and the images in it; None for no picture.
    """

    objective: Callable[[Run, Stage, Trainee, Checkpoint, Checkpoint | None], Objective]
    draw: Draw | None
