"""The report of a ladder: a table, the same as JSON, and pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from evaluation.gallery import Gallery
from pipeline.checkpoint import Checkpoint
from pipeline.codec import decode
from training.ladder import reference_steps
from training.starts import Run
from utils.command import say
from utils.files import write_text
from utils.images import by_class, make_grid, save_figure, save_png

PICTURED_STEPS = 8  # comparison.png: teacher | teacher at 8 steps | student at 8 steps
PICTURED_STAGES = (8, 4, 2, 1)
NUM_IMAGES = 64  # in a trajectory error
COLUMNS = 16  # of ladder.png
CHUNK = 32  # images per file


def trajectory_error(
    images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
) -> float:
    """Returns the mean squared distance to the reference over the first 64 images."""
    difference = images[:NUM_IMAGES].double() - reference[:NUM_IMAGES].double()
    return difference.square().mean().item()


@dataclass(frozen=True)
class LadderRow:
    """One stage: the trajectory errors of its student and of the first teacher at as many steps."""

    num_steps: int
    updates: int
    student_error: float
    teacher_error: float

    @property
    def ratio(self) -> float:
        """The student's error over the first teacher's at the same step count."""
        return self.student_error / self.teacher_error if self.teacher_error else float("inf")


Decode = Callable[[Tensor], Tensor]


class LadderReport:
    """Collects the images and errors of a ladder, stage by stage, and writes its report.

    base: the checkpoint that the ladder starts from. Errors are distances to its images at its
    most steps. base_path: its file. The processes of a run share the sampling; rank 0 writes.
    """

    def __init__(self, run: Run, base: Checkpoint, base_path: Path) -> None:
        self.run, self.base, self.base_path = run, base, base_path
        self.count = max(NUM_IMAGES, run.config.sampling.grid)
        folder = run.output / "images"
        self.gallery = Gallery(folder, run.world, run.config.seed, 64, CHUNK, raw=True)
        self.reference_steps = reference_steps(base, run.config)
        self.guidance = (run.config.distillation.guidance or (0.0,))[0]  # the least they know
        self.teachers: dict[int, Tensor] = {}
        self.students: dict[int, Tensor] = {}
        self.rows: list[LadderRow] = []
        self._error_of_teacher(self.reference_steps)

    def _images(
        self, checkpoint: Checkpoint, path: Path, sampler: str, num_steps: int
    ) -> Float[Tensor, "n c h w"]:
        return self.gallery.images(checkpoint, path, sampler, num_steps, self.count, self.guidance)

    def _error_of_teacher(self, num_steps: int) -> float:
        images = self._images(self.base, self.base_path, self.base.sampler or "ddim", num_steps)
        self.teachers[num_steps] = images
        return trajectory_error(images, self.teachers[self.reference_steps])

    def add(self, student: Checkpoint) -> None:
        """Measures a stage, writes its grid and the table so far, and prints its line."""
        output, num_steps = self.run.output, student.num_steps or 1
        path = output / f"student-{num_steps}.pt"
        images = self._images(student, path, student.sampler or "ddim", num_steps)
        self.students[num_steps] = images
        error = trajectory_error(images, self.teachers[self.reference_steps])
        row = LadderRow(num_steps, student.update, error, self._error_of_teacher(num_steps))
        self.rows.append(row)
        if not self.run.world.leads:
            return
        count = self.run.config.model.num_classes
        classes = None if count is None else range(count)
        shown = self.run.codec.decode(images[: self.run.config.sampling.grid])
        grid = make_grid(*by_class(shown, classes))
        save_png(output / f"student-{num_steps}.png", grid, scale=2)
        write_table(output, self.run.name, self.rows, self.reference_steps, self.table())
        say(
            f"student at {num_steps}: trajectory error {row.student_error:.6f}, "
            f"first teacher {row.teacher_error:.6f}"
        )

    def table(self) -> str:
        """Returns the table of the stages so far."""
        what = "images" if self.base.config.codec.identity is None else "latents"
        if not self.base.config.diffusion.clip:
            what += ", not clipped"
        if self.guidance:
            what += f", guidance {self.guidance:g}"
        return ladder_table(self.rows, self.reference_steps, self.base.sampler, what)

    def finish(self) -> None:
        """Draws the pictures and prints the table."""
        if not self.run.world.leads:
            return
        draw_pictures(
            self.run.output,
            self.teachers,
            self.students,
            self.reference_steps,
            self.run.codec.decode,
        )
        say(self.table())


def ladder_table(
    rows: Sequence[LadderRow],
    reference_steps: int,
    sampler: str | None = None,
    what: str = "images",
) -> str:
    """Returns the ladder as a Markdown table below a line that explains it.

    sampler: the sampler of the student that the ladder starts from; None if from a base model.
    what: whose distances they are, images or latents, and how these were drawn.
    """
    reference, teacher = (
        ("base teacher", "undistilled teacher")
        if sampler is None
        else ("first teacher", "first teacher")
    )
    drawn = "DDIM" if sampler in (None, "ddim") else sampler
    kind = what.partition(",")[0]
    lines = [
        f"Mean squared distance to the {reference}'s {reference_steps}-step {drawn} {kind} from "
        f"the same noise ({NUM_IMAGES} {what}):",
        "",
        f"| steps | updates | student | {teacher} | student / teacher |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.num_steps} | {row.updates} | {row.student_error:.6f} | {row.teacher_error:.6f} "
        f"| {row.ratio:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_table(
    folder: Path, name: str, rows: Sequence[LadderRow], reference_steps: int, table: str
) -> None:
    """Writes ladder.md and ladder.json."""
    write_text(
        folder / "ladder.md",
        f"# The ladder of {name}\n\n{table}\n\n"
        "![teacher at many steps, teacher and student at few](comparison.png)\n\n"
        "![teacher and students at few steps, from the same noise](ladder.png)\n",
    )
    numbers = {"reference_steps": reference_steps, "rows": [asdict(row) for row in rows]}
    write_text(folder / "ladder.json", json.dumps(numbers, indent=2) + "\n")


def draw_pictures(
    folder: Path,
    teachers: Mapping[int, Float[Tensor, "n c h w"]],
    students: Mapping[int, Float[Tensor, "n c h w"]],
    reference_steps: int,
    decode: Decode = decode,
) -> None:
    """Writes comparison.png and ladder.png.

    teachers, students: what they drew from the same noise, by step count. decode: to uint8 images.
    """
    shown = PICTURED_STEPS if PICTURED_STEPS in students else min(students)
    draw_comparison(folder / "comparison.png", teachers, students, reference_steps, shown, decode)
    few = [n for n in PICTURED_STAGES if n in students] or [shown]
    draw_ladder(folder / "ladder.png", teachers, students, reference_steps, few, decode)


def draw_comparison(
    path: Path,
    teachers: Mapping[int, Float[Tensor, "n c h w"]],
    students: Mapping[int, Float[Tensor, "n c h w"]],
    reference_steps: int,
    num_steps: int,
    decode: Decode,
) -> None:
    """Draws grids from the same noise: the teacher at many and few steps, students at few."""
    from matplotlib.figure import Figure

    grids = [
        (f"teacher, {_steps(reference_steps)}", teachers[reference_steps]),
        (f"teacher, {_steps(num_steps)}", teachers[num_steps]),
        (f"student, {_steps(num_steps)}", students[num_steps]),
    ]
    fewer = [n for n in PICTURED_STAGES if n < num_steps and n in students]
    grids += [(f"student, {_steps(n)}", students[n]) for n in fewer]
    rows = 1 + bool(fewer)
    figure = Figure(figsize=(12, 4.4 * rows), layout="constrained")
    places = figure.subplots(rows, 3, squeeze=False).ravel()  # .flat is spent after one loop
    for axes in places:
        axes.set_axis_off()
    for axes, (title, images) in zip(places, grids, strict=False):
        _show(axes, make_grid(decode(images)), title)
    save_figure(path, figure)


def draw_ladder(
    path: Path,
    teachers: Mapping[int, Float[Tensor, "n c h w"]],
    students: Mapping[int, Float[Tensor, "n c h w"]],
    reference_steps: int,
    steps: Sequence[int],
    decode: Decode,
) -> None:
    """Draws rows of images from the same noise: the reference, then student and teacher."""
    from matplotlib.figure import Figure

    rows = [(f"teacher, {_steps(reference_steps)}", teachers[reference_steps])]
    for n in steps:
        rows += [(f"student, {_steps(n)}", students[n]), (f"teacher, {_steps(n)}", teachers[n])]
    figure = Figure(figsize=(12, 0.74 * len(rows) + 0.1), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        _show(axes, make_grid(decode(images[:COLUMNS]), COLUMNS), "")
        axes.text(-0.01, 0.5, title, transform=axes.transAxes, ha="right", va="center")
    save_figure(path, figure)


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _show(axes, image: Tensor, title: str) -> None:  # type: ignore[no-untyped-def]
    pixels = image.permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
