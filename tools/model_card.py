"""The README.md of an exported model: what it is, how good, and code that samples from it."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.gallery import Gallery
from evaluation.results import Results, Row, read_results
from evaluation.tables import markdown
from pipeline.build import image_shape
from pipeline.checkpoint import Checkpoint
from tools.diffusers_format import Exported
from utils.command import InputError, warn
from utils.processes import World


def measured(path: Path, checkpoint: Checkpoint, steps: int, guidance: float) -> list[Row]:
    """Returns the rows of evaluate.py's results.json that measure these weights in these steps."""
    results = read_results(path)
    if results is None:
        raise InputError(f"--results {path}: no such file; evaluate.py writes a results.json")
    gallery = Gallery(Path(), World(torch.device("cpu")), seed=0, batch_size=1)
    key = gallery.key(checkpoint, checkpoint.sampler or "ddim", steps, guidance)
    rows = [row for row in results.rows if row.source == key]
    if not rows:
        warn(f"--results {path}: no row measures these weights in {steps} steps (seed 0, fp32)")
    return rows


def model_card(checkpoint: Checkpoint, parts: Exported, folder: str, rows: Sequence[Row]) -> str:
    """Returns the README.md in Markdown. folder: the name that its code loads the model from."""
    sections = [HEADER.format(name=folder), _description(checkpoint, parts)]
    if rows:
        table = markdown(Results("", {}, rows))
        sections.append(f"## How good it is\n\n{MEASURED}\n\n{table}")
    code = _loop(checkpoint, parts, folder) if _needs_loop(parts) else _pipeline(parts, folder)
    sections.append(f"## How to sample\n\n{_advice(parts)}\n\n```python\n{code}\n```")
    return "\n\n".join(sections) + "\n"


HEADER = """\
---
library_name: diffusers
tags:
- diffusion
- progressive-distillation
---

# {name}"""

MEASURED = """\
n images of this model beside real ones; for the Frechet and the kernel distance, lower is
better."""


def _description(checkpoint: Checkpoint, parts: Exported) -> str:
    config = checkpoint.config
    channels, height, width = image_shape(config)
    if checkpoint.num_steps is None:
        method = "none: a base model"
    else:
        # A student converted from another format has the config of its network alone.
        recipe = config.distillation.of_student(checkpoint.num_steps)
        method = f"{recipe['method']} distillation"
    classes = config.model.num_classes
    facts = {
        "distilled by": method,
        "sampling steps": f"{parts.steps} (DDIM)",
        "images": f"{height} x {width}, {channels} channel{'s' * (channels > 1)}",
        "training data": config.data.name,
        "classes": _classes(classes, parts.unet.get("num_class_embeds")),
        "the network predicts": config.diffusion.prediction,
        "parameters": f"{sum(t.numel() for t in parts.weights.values()):,}",
    }
    return (
        f"A diffusion model, {checkpoint.name}, made for {parts.steps} "
        f"step{'s' * (parts.steps > 1)} of sampling.\n\n"
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    )


def _classes(count: int | None, rows: int | None) -> str:
    """Returns what class_labels may be. rows: of the network's table of classes."""
    if count is None:
        return "none"
    return f"0 to {count - 1}" + (f"; {count} is no class" if rows == count + 1 else "")


def _needs_loop(parts: Exported) -> bool:
    """Whether DDIMPipeline cannot sample: it passes no class and folds no pixels."""
    return parts.patch_size > 1 or parts.unet.get("num_class_embeds") is not None


def _advice(parts: Exported) -> str:
    lines = [f"Sample in {parts.steps} step{'s' * (parts.steps > 1)}."]
    if parts.scheduler["num_train_timesteps"] == parts.steps:
        lines = [f"{lines[0][:-1]}: the network knows these noise levels only."]
    if parts.clip:
        lines.append(
            "The scheduler clips x_hat to [-1, 1], and needs `use_clipped_model_output=True` to "
            "follow it."
        )
    if parts.patch_size > 1:
        p = parts.patch_size
        lines.append(
            f"The network works on pixels that are folded {p} x {p} into channels: DDIMPipeline "
            "alone would return the folded images."
        )
    return "\n".join(lines)


def _pipeline(parts: Exported, folder: str) -> str:
    return f"""\
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained({json.dumps(folder)})
images = pipeline(
    batch_size=16, num_inference_steps={parts.steps}, use_clipped_model_output={parts.clip}
).images
images[0].save("sample.png")"""


def _loop(checkpoint: Checkpoint, parts: Exported, folder: str) -> str:
    shape = image_shape(checkpoint.config)
    classes = checkpoint.config.model.num_classes
    drawn = f"torch.randn(16, {', '.join(map(str, shape))})"
    fold = unfold = ""
    imports = "import torch\nfrom diffusers import DDIMPipeline"
    if parts.patch_size > 1:
        imports += "\nfrom torch.nn.functional import pixel_shuffle, pixel_unshuffle"
        fold = f"    z = pixel_unshuffle(z, {parts.patch_size})\n"
        unfold = f"    z = pixel_shuffle(z, {parts.patch_size})\n"
    call = "z, t" if classes is None else "z, t, class_labels"
    given = drawn if classes is None else f"{drawn}, torch.arange(16) % {classes}"
    return f"""\
{imports}

pipeline = DDIMPipeline.from_pretrained({json.dumps(folder)})
unet, scheduler = pipeline.unet, pipeline.scheduler


@torch.no_grad()
def sample({"z" if classes is None else "z, class_labels"}):
    scheduler.set_timesteps({parts.steps})
{fold}    for t in scheduler.timesteps:
        output = unet({call}).sample
        z = scheduler.step(output, t, z, use_clipped_model_output={parts.clip}).prev_sample
{unfold}    return ((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


images = sample({given})"""
