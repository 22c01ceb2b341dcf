"""Writes the models of the page in docs/demo: python -m tools.export_demo."""

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from utils.command import InputError, path_name, run_script, say, whole_number

DESCRIPTION = """\
Write the models of the page in docs/demo. All checkpoints but the guided one have the same network:
its graph is stored once (z, logsnr -> x_hat, eps_hat), and the weights of each beside it in half
precision and gzip. manifest.json lists the files with their sizes, digests and noise levels."""
FORMAT = "progressive-distillation demo"
FORMAT_VERSION = 1
Files = dict[str, bytes]  # by their names
PRETRAINED = (
    "teacher",
    "adversarial-8-steps",
    "adversarial-4-steps",
    "adversarial-2-steps",
    "adversarial-1-step",
)
PUBLISHED = [Path(f"pretrained/mnist-{name}.safetensors") for name in PRETRAINED]
GUIDED = Path("pretrained/mnist-by-class-8-steps.safetensors")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and exports. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    given = "a base model and its students; by default those in pretrained/, --guided too"
    add("--checkpoint", nargs="+", type=path_name, metavar="FILE", help=given)
    guided = "a student that takes a class and a guidance weight, for the page's last section"
    add("--guided", type=path_name, metavar="FILE", help=guided)
    steps = "of the base model (64)"
    add("--steps", type=whole_number(1, 1024), default=64, metavar="N", help=steps)
    add("--output", type=path_name, default=Path("docs/demo/models"), metavar="DIR")
    return run_script(parser, argv, export)


def export(arguments: argparse.Namespace) -> None:
    """Makes all files, then writes them, the manifest last."""
    from pipeline.checkpoint import load_checkpoint
    from utils.files import atomic_write

    folder, paths, guided_path = arguments.output, arguments.checkpoint, arguments.guided
    if paths is None:
        paths, guided_path = PUBLISHED, guided_path or GUIDED
    loaded = [(path, load_checkpoint(path)) for path in paths]
    first_path, first = loaded[0]
    for path, checkpoint in loaded:
        _require_drawable(path, checkpoint)
        same = ("model", "diffusion.prediction", "diffusion.clip", "data.image_size")
        for ours, theirs, key in zip(_network(checkpoint), _network(first), same, strict=True):
            if ours != theirs:
                raise InputError(f"{path}: {key} is not that of {first_path}; one graph is for all")
        if checkpoint.config.model.num_classes is not None:
            raise InputError(f"{path}: model.num_classes: set; give this one as --guided")
    names = [_name(checkpoint) for _, checkpoint in loaded]
    for n, (path, _) in enumerate(loaded):
        if names[n] in names[:n]:
            raise InputError(f"{path}: a second {names[n]}; give one of each")
    guided = None if guided_path is None else _load_guided(guided_path, first)
    graph, order = _graph(first_path, first)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "image_size": first.config.data.image_size,
    }
    files: Files = {}
    models = []
    for path, checkpoint in loaded:
        levels = checkpoint.levels(None if checkpoint.num_steps else arguments.steps)
        models.append(_model(files, _name(checkpoint), path, checkpoint, order, levels.tolist()))
    manifest["graph"] = _stored(files, "graph.onnx", graph)
    manifest["models"] = sorted(models, key=lambda model: (-model["steps"], model["name"]))
    if guided_path is not None:
        manifest["guided"] = _guided(files, guided_path, guided)
    _stored(files, "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    size = sum(map(len, files.values()))
    say(f"written: {folder}: {', '.join(m['name'] for m in models)}, {size / 1e6:.1f} MB in all")


def _load_guided(path: Path, other: Any) -> Any:
    """Returns the guided student in the file, for images as large as those of the other one."""
    from pipeline.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    model, size = checkpoint.config.model, checkpoint.config.data.image_size
    _require_drawable(path, checkpoint)
    if not checkpoint.num_steps or not model.guidance or model.num_classes is None:
        raise InputError(
            f"--guided {path}: not a student that takes a class and a guidance weight; give one "
            "distilled with distillation.guidance (configs/mnist_guided.yaml)"
        )
    if size != other.config.data.image_size:
        raise InputError(f"--guided {path}: data.image_size: {size}, not that of the other models")
    return checkpoint


def _guided(files: Files, path: Path, checkpoint: Any) -> dict[str, Any]:
    """Adds graph and weights of the guided student. Returns its entry of the manifest."""
    graph, order = _graph(path, checkpoint)
    entry = _model(files, "guided", path, checkpoint, order, checkpoint.levels().tolist())
    return {
        **entry,
        "graph": _stored(files, "guided.onnx", graph),
        "classes": checkpoint.config.model.num_classes,
        "guidance": list(checkpoint.config.distillation.guidance or (0.0, 4.0)),
    }


def _require_drawable(path: Path, checkpoint: Any) -> None:
    """Raises InputError for a checkpoint that the page cannot sample from."""
    config = checkpoint.config
    if config.codec.name != "pixels":
        raise InputError(f"{path}: a model of latents (codec.name); only pixels are exported")
    if config.data.channels != 1:
        raise InputError(f"{path}: data.channels: {config.data.channels}; the page draws grey, 1")
    if checkpoint.sampler not in (None, "ddim"):
        raise InputError(f"{path}: its sampler is {checkpoint.sampler}; the page has ddim only")


def _name(checkpoint: Any) -> str:
    """Returns what the page calls the model."""
    return "teacher" if checkpoint.num_steps is None else f"student-{checkpoint.num_steps}"


def _network(checkpoint: Any) -> tuple[Any, ...]:
    """Returns what the graph depends on."""
    config, diffusion = checkpoint.config, checkpoint.config.diffusion
    return config.model, diffusion.prediction, diffusion.clip, config.data.image_size


def _graph(path: Path, checkpoint: Any) -> tuple[bytes, list[str]]:
    """Returns the graph of one step, and the names of its weights in the order they are stored in.

    The weights are external data, float16, in a file that onnxruntime is given as "weights"; the
    graph widens them.
    """
    import torch

    from pipeline.build import image_shape, load_denoiser
    from pipeline.sections import EngineConfig
    from tools import onnx_file

    denoiser = load_denoiser(checkpoint, path, torch.device("cpu"), EngineConfig())
    conditions = onnx_file.conditions_of(checkpoint)
    shape = image_shape(checkpoint.config)
    # Optimisation would merge weights that happen to be equal: then the graph fits one checkpoint.
    model = onnx_file.one_step(denoiser, conditions, shape, optimize=False)
    from onnx import TensorProto  # one_step has told what to install, where it is missing

    onnx_file.halve(model, path, smallest=1)
    order, offset = [], 0
    for tensor in model.graph.initializer:
        name = tensor.name.removeprefix("network.").removesuffix(".half")
        if tensor.data_type != TensorProto.FLOAT16 or name not in checkpoint.weights:
            continue
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        order.append(name)
        offset += length
    if missing := sorted(set(checkpoint.weights) - set(order)):
        raise InputError(f"{path}: {missing[0]}: the graph does not have this weight by its name")
    return model.SerializeToString(deterministic=True), order


def _model(
    files: Files, name: str, path: Path, checkpoint: Any, order: list[str], levels: list[float]
) -> dict[str, Any]:
    """Adds the weights of a checkpoint. Returns its entry of the manifest."""
    from pipeline.checkpoint_checks import require_finite

    halves = {key: checkpoint.weights[key].half().contiguous() for key in order}
    require_finite(halves, f"{path}: not exported, as in half precision")
    content = b"".join(halves[key].numpy().astype("<f2").tobytes() for key in order)
    return {
        "name": name,
        "steps": len(levels) - 1,
        "levels": levels[:-1],  # JSON has no infinity
        "clip": checkpoint.config.sampling.clip,
        "weights": _packed(files, f"{name}.bin", content),
    }


def _packed(files: Files, name: str, content: bytes) -> dict[str, Any]:
    """Adds the file in gzip. Returns its names and sizes with and without, and its digest.

    The digest is that of the content, as some servers unpack it on the way.
    """
    packed = _stored(files, f"{name}.gz", gzip.compress(content, mtime=0))
    return {"packed": packed["file"], "packedBytes": packed["bytes"], **_described(name, content)}


def _stored(files: Files, name: str, content: bytes) -> dict[str, Any]:
    """Adds the file. Returns its name, size and digest."""
    files[name] = content
    return _described(name, content)


def _described(name: str, content: bytes) -> dict[str, Any]:
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
