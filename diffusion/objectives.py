"""Objectives: what is drawn at random for an update, and the loss that follows from it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.adversarial import Adversary, onward
from diffusion.distillation import distillation_loss
from diffusion.gaussian import Denoise, Prediction, conditioned, diffuse
from diffusion.losses import Example, Loss
from diffusion.paths import Paths
from diffusion.schedule import Schedule, level_dtype, levels_at

Tensors = dict[str, Tensor]


class Objective(NamedTuple):
    """What an update learns.

    draw: (generator, shape of the images) -> all that is random, for the whole global batch: named
    tensors with a row for each image. loss: (x, condition, drawn) -> the loss and the logsnr of
    each example, both (B,); x, condition and drawn may be any rows of the batch.
    """

    draw: Callable[[torch.Generator, torch.Size], Tensors]
    loss: Callable[[Tensor, Tensors, Tensors], tuple[Tensor, Tensor]]


def denoising_loss(
    denoise: Denoise,
    x: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    logsnr: Float[Tensor, "b"],
    loss: Loss,
) -> Float[Tensor, "b"]:
    """The loss of predicting x and eps from z_t = alpha x + sigma eps, per example.

    Salimans & Ho 2022, section 2 and algorithm 1. x: images in the model's range; eps: standard
    normal noise.
    """
    prediction = denoise(diffuse(x, eps, logsnr), logsnr)
    return loss(Example(prediction, Prediction(x, eps), x, logsnr, end=logsnr))


def denoising_objective(
    denoiser: Denoise,
    schedule: Schedule,
    loss: Loss,
    stratified: bool = False,
    label_dropout: float = 0.0,
) -> Objective:
    """The denoising loss in continuous time, t ~ U(0, 1) (Salimans & Ho 2022, algorithm 1).

    stratified: the n-th of B images has t ~ U(n/B, (n+1)/B). The mean over the batch has the same
    expectation and a smaller variance. label_dropout: the share of images whose class is withheld
    from the network, for classifier-free guidance.
    """

    def draw(rng: torch.Generator, shape: torch.Size) -> Tensors:
        eps = torch.randn(shape, generator=rng, device=rng.device)
        t = torch.rand(shape[0], generator=rng, device=rng.device, dtype=level_dtype(rng.device))
        if stratified:
            t = (t + torch.arange(shape[0], device=rng.device)) / shape[0]
        if not label_dropout:
            return {"eps": eps, "t": t}
        dropped = torch.rand(shape[0], generator=rng, device=rng.device) < label_dropout
        return {"eps": eps, "t": t, "dropped": dropped}

    def losses(x: Tensor, condition: Tensors, drawn: Tensors) -> tuple[Tensor, Tensor]:
        if "label" in condition and "dropped" in drawn:
            label = condition["label"].masked_fill(drawn["dropped"], -1)
            condition = {**condition, "label": label}
        logsnr = levels_at(schedule, drawn["t"])
        denoise = conditioned(denoiser, **condition)
        return denoising_loss(denoise, x, drawn["eps"], logsnr, loss), logsnr

    return Objective(draw, losses)


def distillation_objective(
    student: Denoise,
    legs: Sequence[Denoise],
    paths: Paths,
    loss: Loss,
    time_exponent: float = 1.0,
    guidance: tuple[float, float] | None = None,
    adversary: Adversary | None = None,
) -> Objective:
    """The student's loss at a random transition (Salimans & Ho 2022, algorithm 2).

    paths: the levels of all M transitions, on the training device. legs: who walks each leg of
    them. i = floor(M t), t = u^(1/p) with u ~ U(0, 1) and p = time_exponent, so that t has the
    density p t^(p-1); 1 is the paper's uniform i. guidance: a weight w ~ U(low, high) is drawn for
    each image and given to the student and to all walkers (Meng et al. 2023). adversary: adds its
    term to the loss.
    """
    num_transitions = paths.shape[1]
    following = paths if adversary is None else onward(paths)

    def draw(rng: torch.Generator, shape: torch.Size) -> Tensors:
        eps = torch.randn(shape, generator=rng, device=rng.device)
        u = torch.rand(shape[0], generator=rng, device=rng.device, dtype=level_dtype(rng.device))
        i = (num_transitions * u ** (1 / time_exponent)).long()
        drawn = {"eps": eps, "i": i.clamp(max=num_transitions - 1)}  # a power may round to 1
        if guidance is not None:
            low, high = guidance
            share = torch.rand(shape[0], generator=rng, device=rng.device)
            drawn["guidance"] = low + (high - low) * share
        return drawn if adversary is None else drawn | adversary.draw(rng, shape)

    def losses(x: Tensor, condition: Tensors, drawn: Tensors) -> tuple[Tensor, Tensor]:
        def terms(example: Example) -> Tensor:
            if adversary is None:
                return loss(example)
            on = following[:, drawn["i"]]
            return loss(example) + adversary.loss(example, denoise, on, of_images, drawn)

        of_images = condition  # without a guidance weight, which the critic's network does not take
        if "guidance" in drawn:
            condition = {**condition, "guidance": drawn["guidance"]}
        denoise, *walk = (conditioned(d, **condition) for d in (student, *legs))
        levels = paths[:, drawn["i"]]
        return distillation_loss(denoise, walk, x, drawn["eps"], levels, terms), levels[0]

    return Objective(draw, losses)
