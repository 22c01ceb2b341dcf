"""Exports a checkpoint to ONNX: python -m tools.export_onnx student-8.pt --output mnist-8.onnx."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from utils.command import InputError, path_name, run_script, say, whole_number

DESCRIPTION = """\
Write a checkpoint as an ONNX model. By default it draws images: noise -> uint8 images, all steps in
one graph. With --one_step it is the network alone: z, logsnr -> x_hat, eps_hat. The batch is of any
size; the metadata holds the noise levels and the config."""
PRECISIONS = ("fp32", "fp16", "int8")
MOST_STEPS = 16  # in one graph


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and exports. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=path_name, help="a .pt or .safetensors file")
    add("--output", type=path_name, required=True, metavar="FILE.onnx")
    add("--one_step", action="store_true", help="the network alone, for a loop of your own")
    steps = "of a base model; by default sampling.steps of its config. A student has its own"
    add("--steps", type=whole_number(1, 2**20), metavar="N", help=steps)
    precision = "of the stored weights: fp16 is widened when loaded, int8 is quantised (fp32)"
    add("--precision", choices=PRECISIONS, default="fp32", help=precision)
    return run_script(parser, argv, export)


def export(arguments: argparse.Namespace) -> None:
    """Writes the file, and opens it once. Raises InputError if ONNX Runtime cannot; it stays."""
    import torch

    from pipeline.build import image_shape, load_denoiser
    from pipeline.checkpoint import load_checkpoint
    from pipeline.sections import EngineConfig
    from tools import onnx_file
    from tools.diffusers_format import require_own_steps
    from utils.files import atomic_write

    path, output = arguments.checkpoint, arguments.output
    if output.suffix != ".onnx":
        raise InputError(f"--output {output}: give a name that ends in .onnx")
    checkpoint = load_checkpoint(path)
    if checkpoint.config.codec.name != "pixels":
        raise InputError(f"{path}: a model of latents (codec.name); only pixels are exported")
    require_own_steps(checkpoint, path, arguments.steps)
    levels = checkpoint.levels(arguments.steps)
    graph = "one_step" if arguments.one_step else "sampler"
    if graph == "sampler":
        sampler = checkpoint.sampler or checkpoint.config.sampling.sampler
        _require_unrollable(path, sampler, len(levels) - 1)
    denoiser = load_denoiser(checkpoint, path, torch.device("cpu"), EngineConfig())
    conditions = onnx_file.conditions_of(checkpoint)
    if graph == "one_step":
        model = onnx_file.one_step(denoiser, conditions, image_shape(checkpoint.config))
        names = ["z", "logsnr", *conditions]
    else:
        clip = checkpoint.config.sampling.clip
        shape = image_shape(checkpoint.config)
        model = onnx_file.all_steps(denoiser, conditions, shape, clip, levels)
        names = ["noise", *conditions]
    about = onnx_file.metadata(checkpoint, graph, levels, arguments.precision)
    if arguments.precision == "fp16":
        onnx_file.halve(model, path)
    elif arguments.precision == "int8":
        model = _quantised(model)
    del model.metadata_props[:]
    for key, text in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    content = model.SerializeToString()
    with atomic_write(output) as file:
        file.write(content)
    onnx_file.read_onnx(output)
    what = "one step" if graph == "one_step" else f"{len(levels) - 1} steps in one graph"
    say(f"written: {output}: {what}, {len(content) / 1e6:.1f} MB, inputs {', '.join(names)}")


def _require_unrollable(path: Path, sampler: str, steps: int) -> None:
    if sampler != "ddim" and steps > 1:
        raise InputError(
            f"{path}: its sampler is {sampler}, and only ddim goes into one graph; give --one_step"
        )
    if steps > MOST_STEPS:
        raise InputError(
            f"{path}: {steps} steps; at most {MOST_STEPS} go into one graph; give --steps (of a "
            "base model) or --one_step"
        )


def _quantised(model: Any) -> Any:
    """Returns the model with weights in int8, by onnxruntime's own dynamic quantisation."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        onnx.save(model, before)
        quantize_dynamic(before, after, weight_type=QuantType.QUInt8)
        return onnx.load(after)


if __name__ == "__main__":
    sys.exit(main())
