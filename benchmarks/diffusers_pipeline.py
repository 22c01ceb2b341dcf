"""Trains a small pipeline with the diffusers library's own classes, to be imported as a teacher.

python -m benchmarks.diffusers_pipeline --output output/pipeline: a UNet2DModel that predicts the
noise of MNIST digits, 1000 linear betas (Ho et al. 2020), in the way of the library's tutorial.
Nothing of this project is used but its data set. It is not resumable: the run takes minutes.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.codec import encode
from pipeline.data import fit, mnist
from utils.command import InputError, path_name, run_script, say, whole_number
from utils.progress import progress_bar

BATCH = 32
RATE = 1e-3
WARMUP = 200
SIZES = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=path_name, required=True, metavar="DIR")
    add("--seconds", type=whole_number(1, 2**20), default=900, help="of CPU time (900)")
    add("--data_root", type=path_name, default=Path("data"), metavar="DIR")
    return run_script(parser, argv, train_pipeline)


def train_pipeline(arguments: argparse.Namespace) -> None:
    """Trains for so long and saves the pipeline, in safetensors."""
    try:
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_cosine_schedule_with_warmup
    except ImportError:
        raise InputError("diffusers: not installed; pip install diffusers") from None
    torch.manual_seed(0)
    network: Any = UNet2DModel(**SIZES)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    pipeline: Any = DDPMPipeline(network, scheduler)

    if arguments.output.exists():
        raise InputError(f"--output {arguments.output}: exists; give another folder")
    torch.set_num_threads(1)
    images = fit(mnist(arguments.data_root)[0], 32, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)

    def update() -> torch.Tensor:
        x = encode(images[torch.randint(len(images), (BATCH,))])
        noise, t = torch.randn_like(x), torch.randint(1000, (BATCH,))
        said = network(scheduler.add_noise(x, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(said, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return loss.detach()

    begun = time.process_time()
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, 10**9)
    timed = 10
    for _ in range(timed):
        update()
    seconds = (time.process_time() - begun) / timed
    total = max(1, int(arguments.seconds / seconds))
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, total)
    with progress_bar(total, "diffusers pipeline", "update") as bar:
        for _ in range(total):
            bar.set_postfix_str(f"loss {update():.4f}", refresh=False)
            bar.update()
    pipeline.save_pretrained(arguments.output)
    size = sum(p.numel() for p in network.parameters())
    say(
        f"trained: {arguments.output}: {size:,} parameters, {total} updates of {BATCH} images\n"
        f"next: python -m tools.import_diffusers {arguments.output} --output "
        f"{arguments.output}.safetensors --set data.name=mnist"
    )


if __name__ == "__main__":
    sys.exit(main())
