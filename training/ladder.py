"""What a ladder is asked for: the teacher's config, and what may be asked for beside it."""

import math
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, differences, make_config
from pipeline.data import DOWNLOADED
from pipeline.sections import PER_STAGE, DataConfig, DistillationConfig
from pipeline.values import TABLE
from training.resume import FREE_KEYS
from utils.command import InputError, warn
from utils.strict_yaml import override, read_yaml

LEAST_ALPHA = 0.05  # below it a teacher that predicts eps gets a warning


def distillation_config(
    teacher: Checkpoint,
    teacher_path: Path,
    config_path: Path | None,
    overrides: list[str],
    first_steps: int | None = None,
    iterations: int | None = None,
) -> Config:
    """Returns the config of a ladder: the teacher's, but for what may be asked for now.

    That is distillation, sampling, engine, data.root and data.workers. first_steps, iterations: if
    given, the part of the ladder that is asked for. Warns of other keys that differ: network,
    diffusion and data are the teacher's. Raises InputError for steps that cannot follow its own.
    """
    where = str(config_path or teacher_path) + (" with --set" if overrides else "")
    before = read_yaml(config_path) if config_path else teacher.config.model_dump(mode="json")
    values = override(before, overrides)
    old, section = (
        {} if v.get("distillation") is None else v["distillation"] for v in (before, values)
    )
    if isinstance(old, dict) and isinstance(section, dict):
        _require_no_other_ladder(section, overrides, where)
        section = section | _part(section, where, first_steps, iterations)
        values["distillation"] = section | _fitting_lists(old, section, where)
        section = values["distillation"]
    if isinstance(section, dict):  # whether a student fits is a question to its teacher's network
        apart = {k: v for k, v in section.items() if k not in ("student", "guidance")}
        values["distillation"] = apart
    given = make_config(values, where)
    compared = ("seed", "model", "diffusion", "data", "codec")
    free = FREE_KEYS | {"model.guidance"}  # it follows from distillation.guidance
    ignored = [k for k in differences(teacher.config, given, compared) if k not in free]
    ignored = [k for k in ignored if k not in _FOUND or _value(given, k) is not None]
    unread = [item.partition("=")[0] for item in overrides]
    ignored += [key for key in unread if key.split(".")[0] in ("output", "training")]
    if ignored:
        warn(
            f"{config_path or '--set'}: {', '.join(ignored)} differ from {teacher_path} or are not "
            "read here; the checkpoint's values hold, and --output says where results go"
        )
    _require_steps(teacher, teacher_path, given.distillation)
    _require_times(teacher, given.distillation, where)
    data = teacher.config.data.model_copy(update={"workers": given.data.workers})
    asked = _asked("data.root", overrides)
    if asked or given.data.name == data.name:  # the folder of other data is no use
        data = data.model_copy(update={"root": given.data.root})
    if not asked and (config_path is None or given.data.name != data.name):
        read = data.model_copy(update={"name": given.distillation.data or data.name})
        require_no_download(read, teacher_path, "--set data.root=DIR")
    codec = teacher.config.codec
    if codec.name == given.codec.name == "autoencoder" and _asked("codec.file", overrides):
        codec = codec.model_copy(update={"file": given.codec.file})
    sections = {"sampling": given.sampling, "engine": given.engine, "data": data, "codec": codec}
    own = teacher.config.model_copy(update=sections).model_dump(mode="json")
    config = make_config({**own, "distillation": section}, where)
    _require_guidance(teacher, teacher_path, config.distillation)
    _warn_of_eps(teacher, teacher_path, config.distillation)
    return config


# What a run fills in of the autoencoder's file, and a config leaves out.
_FOUND = ("codec.latent_channels", "codec.downsampling", "codec.digest")


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name, None)


def _asked(key: str, overrides: list[str]) -> bool:
    """Whether the command line sets the key."""
    return any(item.startswith(f"{key}=") for item in overrides)


def _require_no_other_ladder(section: dict[str, Any], overrides: list[str], where: str) -> None:
    """Raises InputError for halvings asked for beside a ladder of the config, which would hold."""
    if section.get("ladder") is None or _asked("distillation.ladder", overrides):
        return
    for key in ("first_steps", "iterations"):
        if _asked(f"distillation.{key}", overrides):
            raise InputError(
                f"{where}: distillation.{key} does nothing beside distillation.ladder = "
                f"{section['ladder']}; to halve the steps, set distillation.ladder=null too"
            )


def _require_times(teacher: Checkpoint, ladder: DistillationConfig, where: str) -> None:
    """Raises InputError for a listed time at which a step of a base model does not begin.

    A student's times are not known, only its levels, and a table's nearest ones are taken.
    """
    if not isinstance(ladder.grid, tuple) or teacher.grid is not None:
        return
    steps = ladder.steps()[0]
    for time in ladder.grid:
        nearest = round(time * steps) / steps
        if abs(time - nearest) > 1e-10:
            raise InputError(
                f"{where}: distillation.grid: {time} is none of the times of the teacher's {steps} "
                f"steps, which are multiples of 1/{steps}; take e.g. {nearest}"
            )


def _require_guidance(teacher: Checkpoint, path: Path, ladder: DistillationConfig) -> None:
    """Raises InputError unless teacher and students agree on the guidance weight."""
    if teacher.config.model.guidance:
        if ladder.guidance is None:
            low, high = teacher.config.distillation.guidance or (0.0, 4.0)
            raise InputError(
                f"{path}: takes the guidance weight, and so do its students; give its range "
                f"(distillation.guidance, e.g. [{low}, {high}])"
            )
    elif ladder.guidance is not None and (
        teacher.kind == "student" or not teacher.config.training.label_dropout
    ):
        what = (
            "a student that takes no guidance weight"
            if teacher.kind == "student"
            else ("never saw images without their class")
        )
        raise InputError(
            f"{path}: {what}, so nothing can be guided (distillation.guidance); take a base model "
            "trained with training.label_dropout, e.g. 0.1"
        )


def _warn_of_eps(teacher: Checkpoint, path: Path, ladder: DistillationConfig) -> None:
    """Warns of students that predict eps where a table of levels ends in nothing but noise.

    x_hat = (z - sigma eps_hat) / alpha there, so that their errors grow by 1 / alpha.
    """
    diffusion, grid = teacher.config.diffusion, teacher.grid or (math.inf,)
    alpha = (1 + math.exp(-grid[0])) ** -0.5
    into = ladder.prediction or diffusion.prediction
    if diffusion.schedule == TABLE and into == "eps" and alpha < LEAST_ALPHA:
        steps = ladder.steps()[0]
        warn(
            f"{path}: predicts eps, and at its first level the error of x_hat is {1 / alpha:.0f} "
            "times that of eps; let the students predict v, the first in as many steps as its "
            f"teacher: distillation.prediction=v distillation.ladder=[{steps},{steps},..]"
        )


def _steps(section: dict[str, Any], where: str) -> tuple[int, ...]:
    """The step counts of an unchecked section of distillation, the teacher's first."""
    keys = ("first_steps", "iterations", "ladder", "grid")
    known = {"distillation": {key: section[key] for key in keys if key in section}}
    return make_config(known, where).distillation.steps()


def _part(
    section: dict[str, Any], where: str, first_steps: int | None, iterations: int | None
) -> dict[str, Any]:
    """The values of distillation that ask for a part of its ladder.

    first_steps: of the first student, iterations: how many students; None for the ladder's own.
    Raises InputError if distillation.ladder has no such student.
    """
    if first_steps is None and iterations is None:
        return {}
    if section.get("ladder") is None:
        asked = {"first_steps": first_steps, "iterations": iterations}
        return {key: value for key, value in asked.items() if value is not None}
    steps = list(_steps(section, where))
    if first_steps is not None and first_steps not in steps[1:]:
        raise InputError(
            f"--initial_sampling_steps {first_steps}: {where} has distillation.ladder, whose "
            f"students have {', '.join(map(str, steps[1:]))} steps; take one of these"
        )
    start = 1 if first_steps is None else steps.index(first_steps, 1)
    part = steps[start - 1 :]
    if iterations is not None and iterations >= len(part):
        raise InputError(
            f"--distillation_iterations {iterations}: {where} has distillation.ladder, with "
            f"{len(part) - 1} students from there on; take at most as many"
        )
    return {"ladder": part[: 1 + (iterations or len(part))]}


def _fitting_lists(
    old: dict[str, Any], section: dict[str, Any], where: str
) -> dict[str, list[Any]]:
    """The lists of the old section with a value for each stage, for the students asked for now.

    A value belongs to its student's step count, so they fit any students that the old ladder has.
    """
    lists = {key: value for key in PER_STAGE if isinstance(value := section.get(key), list)}
    kept = {key: value for key, value in lists.items() if value == old.get(key)}
    if not kept:
        return {}
    before, students = (_steps(part, where)[1:] for part in (old, section))
    if not set(students) <= set(before):
        return {}
    return {
        key: [value[before.index(n)] for n in students]
        for key, value in kept.items()
        if len(value) == len(before)
    }


def _require_steps(teacher: Checkpoint, path: Path, ladder: DistillationConfig) -> None:
    """Raises InputError if the teacher's own number of steps does not begin the ladder."""
    own, (asked, first, *_) = teacher.num_steps, ladder.steps()
    if own is None and teacher.grid is not None and asked >= len(teacher.grid):
        raise InputError(
            f"{path}: has {len(teacher.grid) - 1} noise levels, but is asked for {asked} steps "
            "(distillation.ladder begins with them); take at most as many"
        )
    if own is None or own == asked:
        return
    if ladder.ladder is not None:
        raise InputError(f"{path}: makes {own} steps, but distillation.ladder begins with {asked}")
    raise InputError(
        f"{path}: makes {own} steps, so its student cannot make {first} "
        "(distillation.first_steps, --initial_sampling_steps): "
        + (f"take {own // 2}" if own % 2 == 0 else "it is odd")
    )


def require_no_download(data: DataConfig, where: Path, option: str) -> None:
    """Raises InputError if data may be downloaded into a folder that only a checkpoint names.

    option: by which the user names it.
    """
    if data.name in DOWNLOADED and data.root != DataConfig().root:
        raise InputError(
            f"{where}: data.root: {data.root!r} is the checkpoint's, and {data.name} may be "
            f"downloaded into it; name the folder yourself ({option})"
        )


def reference_steps(teacher: Checkpoint, config: Config) -> int:
    """The steps of the images that a ladder is measured by: the base teacher's finest grid."""
    finest = max(config.sampling.steps, config.distillation.steps()[0])
    return finest if teacher.grid is None else min(finest, len(teacher.grid) - 1)
