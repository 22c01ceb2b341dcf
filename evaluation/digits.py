"""A small classifier of MNIST digits, whose features measure samples: python -m evaluation.digits.

Trains it and writes output/digits.safetensors; the weights beside this file were made so. It is
trained on the first 50,000 images of MNIST's training set. The other 10,000 are as new to it as
the test set.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.codec import encode
from pipeline.data import fit, read_mnist
from utils.command import InputError, path_name, run_script, say, whole_number
from utils.files import atomic_write
from utils.progress import progress_bar
from utils.randomness import batch_indices, generator

WEIGHTS = Path(__file__).with_name("digits.safetensors")
TRAINED_ON = 50_000  # the first of the 60,000 training images
NUM_FEATURES = 128
SEED, EPOCHS, BATCH_SIZE, RATE = 0, 12, 100, 3e-3


class DigitNetwork(nn.Module):
    """Digits (B, 1, 32, 32) -> 128 features and ten logits: six convolutions, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in [*widths, (128, NUM_FEATURES, 2)]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear(NUM_FEATURES, 10)

    def forward(
        self, x: Float[Tensor, "b 1 32 32"]
    ) -> tuple[Float[Tensor, "b 128"], Float[Tensor, "b 10"]]:
        """x: digits in [-1, 1]. Returns features and logits."""
        features = self.layers(x).mean((2, 3))
        return features, self.classify(features)


def load_digit_network(device: torch.device, path: Path = WEIGHTS) -> DigitNetwork:
    """Returns the frozen network. Raises InputError for missing or damaged weights."""
    network = DigitNetwork()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        raise InputError(
            f"{path}: missing or damaged; restore it from the repository "
            f"(git checkout evaluation/{path.name})"
        ) from None
    return network.to(device).eval().requires_grad_(False)


# --- training -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Trains the classifier and writes its weights. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=path_name, default=Path("data"), help="the folder of mnist/")
    output = Path("output") / WEIGHTS.name
    parser.add_argument("--output", type=path_name, default=output, metavar="FILE.safetensors")
    parser.add_argument("--epochs", type=whole_number(1, 2**20), default=EPOCHS)
    return run_script(parser, argv, train_and_write)


def train_and_write(arguments: argparse.Namespace) -> None:
    """Trains on the first 50,000 images, writes the weights and prints the accuracy."""
    root, output, epochs = arguments.root, arguments.output, arguments.epochs
    images, labels = read_mnist(root / "mnist")
    images = fit(images[:, None], 32, 1)
    network = train(images[:TRAINED_ON], labels[:TRAINED_ON], epochs)
    test_images, test_labels = read_mnist(root / "mnist", "t10k")
    accuracies = {
        "test": accuracy(network, fit(test_images[:, None], 32, 1), test_labels),
        "held_out": accuracy(network, images[TRAINED_ON:], labels[TRAINED_ON:]),
    }
    about = {"seed": str(SEED), "epochs": str(epochs), "accuracy": json.dumps(accuracies)}
    with atomic_write(output) as file:
        file.write(save(network.state_dict(), about))
    say(
        f"written: {output}; recognised: {accuracies['test']:.2%} of the test images, "
        f"{accuracies['held_out']:.2%} of the 10,000 training images that it has not seen"
    )


def train(
    images: UInt8[Tensor, "n 1 32 32"], labels: Int[Tensor, "n"], epochs: int
) -> DigitNetwork:
    """Trains with AdamW and a one-cycle learning rate on slightly rotated and shifted digits."""
    torch.manual_seed(SEED)
    network = DigitNetwork()
    updates = epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(updates, 10))
    with progress_bar(updates, "digits", "update") as bar:
        for update in range(updates):
            indices = batch_indices(len(images), BATCH_SIZE, SEED, 0, update)
            x = moved(encode(images[indices]), generator("cpu", SEED, "moved", update))
            _, logits = network(x)
            loss = F.cross_entropy(logits, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return network.eval()


def moved(x: Float[Tensor, "b 1 h w"], rng: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Rotates digits by up to 0.15 radians, scales by up to 10%, shifts by up to 2 pixels."""
    turn, scale, right, down = 2 * torch.rand(4, len(x), generator=rng) - 1
    angle, size = 0.15 * turn, 1 + 0.1 * scale
    cosine, sine = size * angle.cos(), size * angle.sin()
    right, down = 4 * right / x.shape[-1], 4 * down / x.shape[-2]  # affine_grid's width is 2
    affine = torch.stack([cosine, -sine, right, sine, cosine, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(
    network: DigitNetwork, images: UInt8[Tensor, "n 1 32 32"], labels: Int[Tensor, "n"]
) -> float:
    """Returns the share of images that are classified correctly."""
    found = [network(encode(part))[1].argmax(1) for part in images.split(500)]
    return (torch.cat(found) == labels).float().mean().item()


if __name__ == "__main__":
    sys.exit(main())
