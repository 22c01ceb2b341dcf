"""What a ladder is asked for: the teacher's config, and what may be asked for beside it."""

from pathlib import Path

from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, DataConfig, differences, load_config, make_config
from training.resume import FREE_KEYS
from utils.command import InputError, warn
from utils.strict_yaml import override


def distillation_config(
    teacher: Checkpoint, teacher_path: Path, config_path: Path | None, overrides: list[str]
) -> Config:
    """The checkpoint's config, but for what may be asked for now.

    That is distillation, sampling, engine, data.root and data.workers.
    Warns in one line of what else was asked for: the network, the diffusion and the data are the
    checkpoint's. Raises InputError for step counts that cannot follow the teacher's.
    """
    if config_path is not None:
        given = load_config(config_path, overrides)
    else:
        values = override(teacher.config.model_dump(mode="json"), overrides)
        given = make_config(
            values, f"{teacher_path} with --set" if overrides else str(teacher_path)
        )
    sections = ("seed", "model", "diffusion", "data")
    ignored = [k for k in differences(teacher.config, given, sections) if k not in FREE_KEYS]
    unread = [item.partition("=")[0] for item in overrides]
    ignored += [key for key in unread if key.split(".")[0] in ("output", "training")]
    if ignored:
        warn(
            f"{config_path or '--set'}: {', '.join(ignored)} differ from {teacher_path} or are not "
            "read here; the checkpoint's values hold, and --output says where results go"
        )
    first = given.distillation.first_steps
    if teacher.num_steps is not None and teacher.num_steps != 2 * first:
        raise InputError(
            f"{teacher_path}: makes {teacher.num_steps} steps, so its student cannot make "
            f"{first} (distillation.first_steps, --initial_sampling_steps): "
            + (f"take {teacher.num_steps // 2}" if teacher.num_steps % 2 == 0 else "it is odd")
        )
    data = teacher.config.data.model_copy(update={"workers": given.data.workers})
    asked = any(item.startswith("data.root=") for item in overrides)
    if asked or given.data.name == data.name:  # the folder of other data is no use
        data = data.model_copy(update={"root": given.data.root})
    if not asked and (config_path is None or given.data.name != data.name):
        require_no_download(data, teacher_path, "--set data.root=DIR")
    return teacher.config.model_copy(
        update={
            "distillation": given.distillation,
            "sampling": given.sampling,
            "engine": given.engine,
            "data": data,
        }
    )


READ_ONLY = ("mnist", "colored_mnist", "image_folder")  # data sets that nothing is downloaded of


def require_no_download(data: DataConfig, where: Path, option: str) -> None:
    """Raises InputError if data may be downloaded into a folder that only a checkpoint names.

    option: by which the user names it.
    """
    if data.name not in READ_ONLY and data.root != DataConfig().root:
        raise InputError(
            f"{where}: data.root: {data.root!r} is the checkpoint's, and {data.name} may be "
            f"downloaded into it; name the folder yourself ({option})"
        )


def reference_steps(teacher: Checkpoint, config: Config) -> int:
    """The steps of the images that a ladder is measured by: the base teacher's finest grid."""
    return teacher.num_steps or max(config.sampling.steps, 2 * config.distillation.first_steps)
