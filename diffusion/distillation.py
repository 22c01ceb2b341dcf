"""Distillation: the target of a student's step, and the methods, which are choices of its parts.

A student's step goes from noise level t to s. A walker, such as the teacher, takes k DDIM steps
through the levels t = l_0, .., l_k = s and predicts x_hat_j on each leg. The student learns to
predict

    x_target = sum_j w_j x_hat_j,    w_j = (u_(j+1) - u_j) / (1 - u_0),    u_j = e^((l_j - l_s) / 2)

so that ONE DDIM step of the student lands where the walk ended. A method says which levels a
transition passes (diffusion/paths.py) and who walks each leg.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.gaussian import Denoise, Prediction, ddim_step, diffuse, eps_from_x
from diffusion.grids import Grid
from diffusion.losses import Example, Loss
from diffusion.paths import Paths, neighbours, segments, to_the_data


def target_weights(levels: Float[Tensor, "n b"]) -> Float[Tensor, "n-1 b"]:
    """The weights of the k predictions in the target.

    w_j = (u_(j+1) - u_j) / (1 - u_0), u_j = e^((l_j - l_s) / 2) and u_k = 1, where l_s is the last
    of the levels: w_j >= 0 and sum_j w_j = 1. Where l_s = +inf the last leg that moves has weight
    1. Two equal neighbouring levels, (+inf, +inf) too, have weight 0.
    """
    last = levels[-1]
    log_u = torch.where(levels == last, 0.0, (levels - last) / 2)  # inf - inf is no number
    u_minus_one = torch.expm1(log_u)
    return (u_minus_one[1:] - u_minus_one[:-1]) / -u_minus_one[0]


@torch.no_grad()
def distillation_target(
    legs: Sequence[Denoise], z_t: Float[Tensor, "b ..."], levels: Float[Tensor, "n b"]
) -> Float[Tensor, "b ..."]:
    """The x for which ONE DDIM step of the student lands on the end of the walk.

    x_target = (z_s - rho z_t) / (alpha_s - rho alpha_t), rho = sigma_s / sigma_t (Salimans & Ho
    2022, algorithm 2), where z_s is the end of the walk. Computed as what it equals without the
    cancellation, sum_j w_j x_hat_j, w = target_weights(levels). A last level of +inf gives the last
    x_hat, as in a sampler (the paper's code makes an exception for i = 0; here it is the same
    formula). A leg between equal levels changes nothing.

    legs: for each leg who walks it, (z, logsnr) -> Prediction, not clipped as for sampling;
    levels: logsnr from t down to s, one more than legs. No gradient flows into the walkers.
    """
    z, x_target = z_t, torch.zeros_like(z_t)
    pairs = pairwise(levels)
    for walk, (here, there), w in zip(legs, pairs, target_weights(levels), strict=True):
        prediction = walk(z, here)
        shape = (-1, *[1] * (z.ndim - 1))
        moves = (here != there).reshape(shape)
        x_target = x_target + torch.where(moves, w.to(z.dtype).reshape(shape) * prediction.x, 0.0)
        z = torch.where(moves, ddim_step(prediction, there), z)
    return x_target


def distillation_loss(
    student: Denoise,
    legs: Sequence[Denoise],
    x: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n b"],
    loss: Loss,
) -> Float[Tensor, "b"]:
    """The student's loss per example, at z_t = alpha x + sigma eps and the first of the levels.

    Salimans & Ho 2022, algorithm 2. The student's eps target follows from (z_t, x_target), not
    from the noise that was drawn. legs, levels: see distillation_target.
    """
    logsnr = levels[0]
    z_t = diffuse(x, eps, logsnr)
    x_target = distillation_target(legs, z_t, levels)
    target = Prediction(x_target, eps_from_x(z_t, x_target, logsnr))
    return loss(Example(student(z_t, logsnr), target, x, logsnr, levels[-1]))


# --- methods --------------------------------------------------------------------------------------

TEACHER, AVERAGE = "teacher", "average"


class Method(NamedTuple):
    """A method of distillation.

    paths: (teacher's grid, student's grid) -> levels of every transition. walkers: who walks the
    first leg, the second, ..; the last one named walks all that follow. AVERAGE is an average of
    the student's own weights, which follows them fast. sampler: how the student is sampled.
    """

    paths: Callable[[Grid, Grid], Paths]
    walkers: tuple[str, ...] = (TEACHER,)
    sampler: str = "ddim"

    @property
    def needs_average(self) -> bool:
        """Whether the student's own average walks some leg."""
        return AVERAGE in self.walkers

    def legs(self, count: int, teacher: Denoise, average: Denoise | None) -> list[Denoise]:
        """Who walks each of so many legs. Raises ValueError where an average is needed."""
        if self.needs_average and average is None:
            raise ValueError("this method needs an average of the student")
        walkers = [*self.walkers, *[self.walkers[-1]] * count][:count]
        by_name = {TEACHER: teacher, AVERAGE: average}
        return [by_name[walker] for walker in walkers]  # type: ignore[misc]


METHODS = {
    "progressive": Method(neighbours),
    "tract": Method(segments, (TEACHER, AVERAGE)),
    "consistency": Method(to_the_data, (TEACHER, AVERAGE), sampler="consistency"),
}
