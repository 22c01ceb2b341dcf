"""Toy networks with known outputs, the reference values, a tiny config."""

from pathlib import Path

import numpy as np
import torch

from diffusion.gaussian import OUTPUT_TYPES, Denoiser, Prediction, eps_from_x, velocity
from diffusion.schedule import alpha_sigma, make_schedule

GOLDEN = Path(__file__).parent / "golden"
COSINE = make_schedule("cosine", -20.0, 20.0)


def golden(name):
    """The arrays of a file of reference values, images as NCHW, all in torch's float64 or int64."""

    def tensor(array):
        t = torch.from_numpy(np.array(array))
        t = t.long() if t.dtype == torch.int32 else t
        return t.permute(0, 3, 1, 2).contiguous() if t.ndim == 4 else t

    with np.load(GOLDEN / name) as file:
        return {key: tensor(file[key]) for key in file if file[key].dtype.kind in "fi"}


def level(logsnr, z):
    return logsnr.to(z.dtype).reshape(-1, 1, 1, 1)


def student_v(z, logsnr):
    return 0.5 * torch.tanh(0.7 * z + 0.1 * level(logsnr, z))


def student_x(z, logsnr):
    return 1.3 * torch.tanh(0.8 * z - 0.05 * level(logsnr, z) + 0.1)


def student_eps(z, logsnr):
    alpha, sigma = alpha_sigma(logsnr, z)
    return sigma * z + 0.3 * alpha * torch.tanh(0.6 * z + 0.05 * level(logsnr, z))


def student_both(z, logsnr):
    return torch.cat([student_x(z, logsnr), student_eps(z, logsnr)], dim=1)


def student_dual(z, logsnr):
    gate = torch.sin(3 * z) - 0.1 * level(logsnr, z)
    return torch.cat([student_x(z, logsnr), student_v(z, logsnr), gate], dim=1)


def teacher_v(z, logsnr):
    return 0.4 * torch.tanh(0.6 * z - 0.08 * level(logsnr, z) + 0.05)


def teacher_x(z, logsnr):
    return 0.9 * torch.tanh(0.75 * z + 0.03 * level(logsnr, z) - 0.1)


STUDENTS = {
    "x": Denoiser(student_x, "x"),
    "eps": Denoiser(student_eps, "eps"),
    "v": Denoiser(student_v, "v"),
    "both": Denoiser(student_both, "both"),
    "dual": Denoiser(student_dual, "dual"),
}
TEACHERS = {"x": Denoiser(teacher_x, "x"), "v": Denoiser(teacher_v, "v")}


def mixture_denoise(z, logsnr, spread=0.1):
    """The exact prediction for pixels that are -1 or 1 with equal odds, blurred by the spread."""
    alpha, sigma = alpha_sigma(logsnr, z)
    variance = alpha**2 * spread**2 + sigma**2
    high = torch.sigmoid(2 * alpha * z / variance)
    gain = alpha * spread**2 / variance
    x = sum(p * (m + gain * (z - alpha * m)) for p, m in ((high, 1.0), (1 - high, -1.0)))
    return Prediction(x, eps_from_x(z, x, logsnr))


def saying(x, output_type):
    """A denoiser whose network's output, of that type, means exactly x, at any z."""

    def network(z, logsnr):
        known = Prediction(x, eps_from_x(z, x, logsnr))
        return {
            "x": known.x,
            "eps": known.eps,
            "v": velocity(known, logsnr),
            "both": torch.cat(known, dim=1),
            "dual": torch.cat([known.x, velocity(known, logsnr), torch.sin(3 * z)], dim=1),
        }[output_type]

    assert output_type in OUTPUT_TYPES
    return Denoiser(network, output_type)


def tiny(**sections):
    """Values of a config that runs in a moment: MNIST, a network of some thousand parameters."""
    values = {
        "model": {
            "channels": 8,
            "channel_multipliers": [1, 2],
            "blocks_per_level": 1,
            "attention_resolutions": [4],
            "dropout": 0.1,
            "patch_size": 4,
        },
        "training": {
            "updates": 4,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "warmup": 2,
            "checkpoint_every": 2,
        },
        "distillation": {
            "first_steps": 4,
            "iterations": 2,
            "updates_per_stage": 3,
            "batch_size": 8,
            "checkpoint_every": 2,
        },
        "sampling": {"steps": 8, "grid": 9},
    }
    for section, changes in sections.items():
        if isinstance(changes, dict):
            values[section] = {**values.get(section, {}), **changes}
        else:
            values[section] = changes
    return values
