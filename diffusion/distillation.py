"""Progressive distillation: the teacher's target and the student's loss."""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.gaussian import Denoise, Prediction, ddim_step, diffuse, eps_from_x
from diffusion.losses import LossWeight


def convex_weights(levels: Float[Tensor, "n b"]) -> Float[Tensor, "n-1 b"]:
    """The weights of the teacher's k predictions in the student's target.

    w_j = (u_(j+1) - u_j) / (1 - u_0), u_j = e^((l_j - l_s) / 2) and u_k = 1, where l_s is the last
    of the levels: w_j >= 0 and sum_j w_j = 1. At l_s = +inf they are (0, .., 0, 1).
    """
    log_u = (levels[:-1] - levels[-1]) / 2
    u_minus_one = torch.cat([torch.expm1(log_u), torch.zeros_like(levels[-1:])])
    return (u_minus_one[1:] - u_minus_one[:-1]) / -u_minus_one[0]


@torch.no_grad()
def distillation_target(
    teacher_denoise: Denoise, z_t: Float[Tensor, "b ..."], levels: Float[Tensor, "n b"]
) -> Float[Tensor, "b ..."]:
    """The x for which ONE DDIM step of the student lands on the end of k steps of its teacher.

    x_target = (z_s - rho z_t) / (alpha_s - rho alpha_t), rho = sigma_s / sigma_t (Salimans & Ho
    2022, algorithm 2), where the teacher stepped from z_t to z_s. Computed as what it equals
    without the cancellation, sum_j w_j x_hat_j over the teacher's predictions on the way, with
    w = convex_weights(levels). A last level of +inf gives the teacher's last x_hat, as a sampler
    would (the paper's code makes an exception for i = 0; here it is the same formula).

    teacher_denoise: (z, logsnr) -> Prediction, never clipped; levels: logsnr from t down to s.
    No gradient flows into the teacher.
    """
    z, x_target = z_t, torch.zeros_like(z_t)
    for logsnr, logsnr_next, w in zip(levels, levels[1:], convex_weights(levels), strict=False):
        prediction = teacher_denoise(z, logsnr)
        x_target = x_target + w.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)) * prediction.x
        z = ddim_step(prediction, logsnr_next)
    return x_target


def distillation_loss(
    student_denoise: Denoise,
    teacher_denoise: Denoise,
    x: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    levels: Float[Tensor, "n b"],
    weight: LossWeight,
) -> Float[Tensor, "b"]:
    """The student's loss per example, at z_t = alpha x + sigma eps and the first of the levels.

    Salimans & Ho 2022, algorithm 2. The student's eps target follows from (z_t, x_target), not
    from the noise that was drawn. levels: see transition_levels; weight: an entry of LOSS_WEIGHTS.
    """
    logsnr = levels[0]
    z_t = diffuse(x, eps, logsnr)
    x_target = distillation_target(teacher_denoise, z_t, levels)
    target = Prediction(x_target, eps_from_x(z_t, x_target, logsnr))
    return weight(student_denoise(z_t, logsnr), target, logsnr)
