"""Trains a diffusion model: python train.py --config_path configs/quickstart.yaml."""

import argparse
import sys
from pathlib import Path

from utils.command import add_common_arguments, parse, run_command

DESCRIPTION = """\
Train a diffusion model as a YAML file says. Writes diffusion-<update>.pt and a grid of samples
every training.checkpoint_every updates and at the end; run the same command again to go on."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code: 0, 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--config_path", type=Path, required=True, metavar="FILE.yaml")
    add_common_arguments(parser)
    arguments = parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    return run_command(lambda: train(arguments))


def train(arguments: argparse.Namespace) -> None:
    """Trains the base model to the end of its plan, from its newest checkpoint if there is one."""
    import copy

    import torch

    from utils.build import (
        build_dataset,
        build_denoiser,
        build_network,
        build_schedule,
        choose_device,
        load_weights,
    )
    from utils.checkpoint import Checkpoint, save_checkpoint
    from utils.config import load_config
    from utils.runs import delete_run, newest_whole, numbered, require_same_run
    from utils.sampling import SampleRequest, write_grid
    from utils.training import Plan, Trainee, base_losses, base_rate, make_optimizer, run_stage

    config = load_config(arguments.config_path, arguments.set)
    training = config.training
    name = arguments.config_path.stem
    output = arguments.output or Path(config.output or f"output/{name}")
    if arguments.restart:
        delete_run(output, ["diffusion-*.pt", "diffusion-*.png", "metrics.jsonl"])

    device = choose_device(arguments.device)
    torch.manual_seed(config.seed)  # of the initial weights
    network = build_network(config, device)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    trainee = Trainee(network, ema, make_optimizer(network, training.weight_decay))
    if (newest := newest_whole(numbered(output, "diffusion-"))) is not None:
        path, checkpoint = newest
        require_same_run(
            path, checkpoint.config, config, ("seed", "data", "model", "diffusion", "training")
        )
        load_weights(network, checkpoint.model, path)
        load_weights(ema, checkpoint.weights, path)
        trainee.optimizer.load_state_dict(checkpoint.optimizer or {})
        trainee.update = checkpoint.update
        print(f"going on from {path}")

    def save(trainee: Trainee) -> None:
        checkpoint = Checkpoint(
            kind="base",
            name=name,
            config=config,
            update=trainee.update,
            stage=0,
            num_steps=None,
            model=network.state_dict(),
            ema=ema.state_dict(),
            optimizer=trainee.optimizer.state_dict(),
        )
        save_checkpoint(checkpoint_path(), checkpoint)
        request = SampleRequest.of(checkpoint, build_denoiser(config, ema), device)
        write_grid(checkpoint_path().with_suffix(".png"), request, config.sampling.grid)

    def checkpoint_path() -> Path:
        return output / f"diffusion-{trainee.update}.pt"

    plan = Plan(
        seed=config.seed,
        stage=0,
        updates=training.updates,
        batch_size=training.batch_size,
        learning_rate=base_rate(training),
        gradient_clip=training.gradient_clip,
        checkpoint_every=training.checkpoint_every,
        ema_decay=training.ema_decay,
        horizontal_flip=config.data.horizontal_flip,
        conditional=config.model.num_classes is not None,
    )
    schedule = build_schedule(config)
    losses = base_losses(build_denoiser(config, network), schedule, config.diffusion.loss_weight)
    dataset = build_dataset(config, device)
    run_stage(
        trainee, plan, dataset, losses, metrics_path=output / "metrics.jsonl", save=save, title=name
    )
    print(
        f"trained for {trainee.update} updates: {checkpoint_path()}, samples beside it\n"
        f"next: python distill.py --config_path {arguments.config_path} "
        f"--teacher_model_checkpoint {checkpoint_path()}"
    )


if __name__ == "__main__":
    sys.exit(main())
