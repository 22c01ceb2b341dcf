"""Publishes checkpoints: python -m tools.publish --checkpoint A.pt B.pt --name mnist."""

import argparse
import sys
from dataclasses import replace

from utils.command import InputError, path_name, run_script, say

DESCRIPTION = """\
Write checkpoints as self-describing .safetensors with the weights to sample from: <name>-teacher
for a base model, <name>-8-steps or <name>-1-step for a student. sample.py, distill.py and
evaluate.py take them like any other checkpoint."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and writes the files. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", type=path_name, nargs="+", required=True, metavar="FILE.pt")
    add("--name", required=True, help="the first part of the files' names")
    add("--output", type=path_name, required=True, metavar="DIR", help="replaces equal names")
    add("--half", action="store_true", help="in float16: half as large")
    return run_script(parser, argv, publish)


def publish(arguments: argparse.Namespace) -> None:
    """Writes each checkpoint. A student's lineage names its teacher as published, if it is.

    The engine of its config, which suited the machine that trained it, becomes the default one.
    """
    from pipeline.checkpoint import digest, load_checkpoint, publish_checkpoint
    from pipeline.sections import EngineConfig

    name = arguments.name
    if not name.strip() or name[0] in ".-" or "/" in name or not name.isprintable():
        raise InputError(f"--name {name!r}: not what file names begin with; take e.g. mnist")
    checkpoints = [load_checkpoint(path) for path in arguments.checkpoint]
    steps_of = [checkpoint.num_steps for checkpoint in checkpoints]
    if len(set(steps_of)) < len(steps_of):
        raise InputError(
            "--checkpoint: two of them would have one name; publish each with a --name of its own"
        )
    renamed: dict[str, str] = {}  # the digest of weights -> that of the published ones
    for checkpoint in sorted(checkpoints, key=lambda c: c.stage):
        steps = checkpoint.num_steps
        made_for = "teacher" if steps is None else f"{steps}-step{'' if steps == 1 else 's'}"
        path = arguments.output / f"{name}-{made_for}.safetensors"
        lineage = {key: renamed.get(of, of) for key, of in checkpoint.lineage.items()}
        config = checkpoint.config.model_copy(update={"engine": EngineConfig()})
        published = replace(checkpoint, config=config, lineage=lineage)
        publish_checkpoint(path, published, arguments.half)
        renamed[digest(checkpoint.weights)] = digest(load_checkpoint(path).weights)
        say(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    sys.exit(main())
