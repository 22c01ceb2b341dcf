"""Exports a checkpoint to diffusers: python -m tools.export_diffusers FILE --output FOLDER."""

import argparse
import json
import sys
from typing import Any

from utils.command import path_name, run_script, say, whole_number

DESCRIPTION = """\
Write a checkpoint as a folder of the diffusers library: a UNet2DModel, a DDIMScheduler with the
noise levels of the checkpoint's steps, and a README.md that says how to sample. What diffusers
cannot hold exactly is refused. diffusers itself is not needed to write the folder."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and exports. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=path_name, help="a .pt or .safetensors file")
    add("--output", type=path_name, required=True, metavar="DIR", help="replaces an older export")
    steps = "of a base model; by default sampling.steps of its config. A student has its own"
    add("--steps", type=whole_number(1, 2**20), metavar="N", help=steps)
    guidance = "the one weight to export of a network that takes the guidance weight as an input"
    add("--guidance", type=float, metavar="W", help=guidance)
    results = "results.json of evaluate.py: its distances go into README.md, if it has this model's"
    add("--results", type=path_name, metavar="FILE", help=results)
    return run_script(parser, argv, export)


def export(arguments: argparse.Namespace) -> None:
    """Writes the folder: model_index.json, unet/, scheduler/ and README.md."""
    import safetensors.torch

    from pipeline.checkpoint import load_checkpoint
    from pipeline.checkpoint_checks import require_finite
    from tools.diffusers_format import exported
    from tools.model_card import measured, model_card
    from training.folder import require_no_run
    from utils.files import atomic_write, write_text

    folder, path = arguments.output, arguments.checkpoint
    require_no_run(folder)
    checkpoint = load_checkpoint(path)
    parts = exported(checkpoint, path, arguments.steps, arguments.guidance)
    require_finite({"unet": parts.weights}, f"{folder}: not written")
    rows = []
    if arguments.results:
        rows = measured(arguments.results, checkpoint, parts.steps, arguments.guidance or 0.0)
    index = folder / "model_index.json"
    index.unlink(missing_ok=True)  # until all else is there, no library takes it for a pipeline
    with atomic_write(folder / "unet" / "diffusion_pytorch_model.safetensors") as file:
        file.write(safetensors.torch.save(parts.weights, {"format": "pt"}))
    write_text(folder / "unet" / "config.json", _json(parts.unet))
    write_text(folder / "scheduler" / "scheduler_config.json", _json(parts.scheduler))
    write_text(folder / "README.md", model_card(checkpoint, parts, folder.resolve().name, rows))
    write_text(index, _json(PIPELINE))
    say(
        f"written: {folder}: {parts.steps} steps of DDIM, "
        f"{sum(t.numel() for t in parts.weights.values()):,} parameters\n"
        f"next: see {folder / 'README.md'}"
    )


PIPELINE = {
    "_class_name": "DDIMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
