"""Prints one digest of a small run: python -m tests.guard.

Trains a tiny base model, distils three stages and draws 16 images through the command lines, with
one process and with two, from fixed seeds. A change that should not change any result must print
the same digests on the same machine as the code before it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model": {
        "channels": 16,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [8],
        "dropout": 0.1,
        "resample": "conv",
        "patch_size": 2,
    },
    "data": {"horizontal_flip": True},
    "training": {
        "updates": 20,
        "batch_size": 16,
        "learning_rate": 1.0e-3,
        "warmup": 5,
        "times": "stratified",
        "checkpoint_every": 10,
    },
    "distillation": {
        "first_steps": 8,
        "iterations": 3,
        "updates_per_stage": [4, 5, 6],
        "time_exponent": [1.0, 1.0, 3.0],
        "batch_size": 16,
        "checkpoint_every": 3,
    },
    "sampling": {"steps": 16, "grid": 9},
}
WEIGHTS = ["base/diffusion-20.pt", *(f"ladder/student-{n}.pt" for n in (8, 4, 2))]


def run(processes: int, *arguments: object) -> None:
    """Runs a script with so many processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def digest_of_run(folder: Path, processes: int) -> str:
    """The SHA-256 of all weights, averages and images of the run, in order."""
    config = folder / "guard.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    run(processes, "train.py", "--config_path", config, "--output", folder / "base")
    distill = ("--config_path", config, "--output", folder / "ladder")
    run(processes, "distill.py", "--teacher_model_checkpoint", folder / WEIGHTS[0], *distill)
    sha = hashlib.sha256()
    for name in WEIGHTS:
        content = torch.load(folder / name, weights_only=True)
        for part in ("model", "ema"):
            for key, tensor in sorted((content[part] or {}).items()):
                sha.update(f"{name} {part} {key} {tuple(tensor.shape)}\n".encode())
                sha.update(tensor.numpy().tobytes())
        images = folder / f"{Path(name).stem}.npz"
        run(
            processes, "sample.py", "--checkpoint", folder / name, "--count", 16, "--output", images
        )
        sha.update(np.load(images)["arr_0"].tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{count} process(es): {digest_of_run(Path(temporary), count)}", flush=True)
