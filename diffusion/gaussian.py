"""Gaussian diffusion: q(z_t | x), what a network's output means, the Denoiser, the DDIM step.

z_t = alpha_t x + sigma_t eps. Times and noise levels reach these functions as logsnr, shape (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.schedule import alpha_sigma

Images = Float[Tensor, "b c h w"]
PerImage = Float[Tensor, "b 1 1 1"]


class Prediction(NamedTuple):
    """What is believed (x_hat, eps_hat) or known (x, eps) of z = alpha x + sigma eps."""

    x: Tensor
    eps: Tensor


Denoise = Callable[..., Prediction]
"""(z, logsnr, **condition) -> Prediction. Samplers and targets call it as (z, logsnr)."""


def diffuse(
    x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b ..."]:
    """A sample of q(z_t | x): z_t = alpha_t x + sigma_t eps (Salimans & Ho 2022, section 2)."""
    alpha, sigma = alpha_sigma(logsnr, x)
    return alpha * x + sigma * eps


def eps_from_x(
    z: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], logsnr: Float[Tensor, "b"]
) -> Float[Tensor, "b ..."]:
    """The noise that z holds if its image is x: eps = (z - alpha x) / sigma."""
    alpha, sigma = alpha_sigma(logsnr, z)
    return (z - alpha * x) / sigma


def velocity(prediction: Prediction, logsnr: Float[Tensor, "b"]) -> Float[Tensor, "b ..."]:
    """v = alpha eps - sigma x (Salimans & Ho 2022, section 4 and appendix D)."""
    alpha, sigma = alpha_sigma(logsnr, prediction.x)
    return alpha * prediction.eps - sigma * prediction.x


# --- what an output means: (output, z, alpha, sigma) -> Prediction ------------------------------


def decode_x(output: Images, z: Images, alpha: PerImage, sigma: PerImage) -> Prediction:
    """The output is x_hat; eps_hat = (z - alpha x_hat) / sigma."""
    return Prediction(output, (z - alpha * output) / sigma)


def decode_eps(output: Images, z: Images, alpha: PerImage, sigma: PerImage) -> Prediction:
    """The output is eps_hat; x_hat = (z - sigma eps_hat) / alpha (Ho et al. 2020)."""
    return Prediction((z - sigma * output) / alpha, output)


def decode_v(output: Images, z: Images, alpha: PerImage, sigma: PerImage) -> Prediction:
    """The output is v_hat; x_hat = alpha z - sigma v, eps_hat = sigma z + alpha v: no division."""
    return Prediction(alpha * z - sigma * output, sigma * z + alpha * output)


def decode_both(
    output: Float[Tensor, "b twice_c h w"], z: Images, alpha: PerImage, sigma: PerImage
) -> Prediction:
    """The output is x_o and eps_o, twice the channels (Salimans & Ho 2022, section 4).

    x_hat = sigma^2 x_o + alpha (z - sigma eps_o); eps_hat = (z - alpha x_hat) / sigma, which is
    sigma (z - alpha x_o) + alpha^2 eps_o without the cancellation.
    """
    x, eps = output.chunk(2, dim=1)
    return Prediction(
        sigma**2 * x + alpha * (z - sigma * eps), sigma * (z - alpha * x) + alpha**2 * eps
    )


def decode_dual(
    output: Float[Tensor, "b thrice_c h w"], z: Images, alpha: PerImage, sigma: PerImage
) -> Prediction:
    """The output is x_o, v_o and a gate for each value, thrice the channels (Benny & Wolf 2022).

    x_hat = g x_o + (1 - g) (alpha z - sigma v_o) with g = sigmoid(gate); eps_hat alike. Where an
    image is constant x_o is easy to predict, because it does not depend on z; v_o is where z has
    little noise. (The paper interpolates x and eps; v has no division at t = 1.)
    """
    x, v, gate = output.chunk(3, dim=1)
    g = torch.sigmoid(gate)
    by_x, by_v = decode_x(x, z, alpha, sigma), decode_v(v, z, alpha, sigma)
    return Prediction(*(g * a + (1 - g) * b for a, b in zip(by_x, by_v, strict=True)))


class OutputType(NamedTuple):
    """How to read a network's output, and how many channels it has for each of the image's."""

    decode: Callable[[Tensor, Tensor, Tensor, Tensor], Prediction]
    channels: int


OUTPUT_TYPES = {
    "x": OutputType(decode_x, 1),
    "eps": OutputType(decode_eps, 1),
    "v": OutputType(decode_v, 1),
    "both": OutputType(decode_both, 2),
    "dual": OutputType(decode_dual, 3),
}


@dataclass(frozen=True)
class Denoiser:
    """A network with what its output means.

    network: (z, logsnr, **condition) -> output; output_type: a name in OUTPUT_TYPES; clip: whether
    x_hat is within_range. Called with z (B, C, H, W), logsnr (B,) and the network's condition it
    returns a Prediction of z's shape. The network is asked in z's precision; the decoding happens
    in float32 or better.
    """

    network: Callable[..., Tensor]
    output_type: str
    clip: bool = False

    def __call__(self, z: Images, logsnr: Float[Tensor, "b"], **condition: Any) -> Prediction:
        """What the network believes of z at this noise level, both x_hat and eps_hat."""
        output = self.network(z, logsnr.to(z.dtype), **condition).to(z.dtype)
        alpha, sigma = alpha_sigma(logsnr, z)
        prediction = OUTPUT_TYPES[self.output_type].decode(output, z, alpha, sigma)
        return within_range(prediction, alpha, sigma) if self.clip else prediction


class _Excess(torch.autograd.Function):
    """clamp(x, -1, 1) - x, whose gradient only keeps x from going further out of [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        excess = x.clamp(-1.0, 1.0) - x
        ctx.save_for_backward(excess)
        return excess

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (excess,) = ctx.saved_tensors
        outwards = excess * gradient > 0
        return torch.where(outwards, -gradient, 0.0)


def within_range(prediction: Prediction, alpha: PerImage, sigma: PerImage) -> Prediction:
    """The prediction with x_hat clipped to [-1, 1] and eps_hat to match, for training too.

    The gradient of a clipped value passes where it leads back into [-1, 1], and is 0 where it leads
    further out. So a network may predict anything below -1 where the image is certainly black: the
    best clipped x_hat is E[x | z] as before, and it need not hit -1 exactly, which would take more
    precision than a network has (docs/experiments.md, "Noise in the background").
    """
    x = prediction.x
    excess = _Excess.apply(x) if x.requires_grad else x.clamp(-1.0, 1.0) - x
    return Prediction(x + excess, prediction.eps - alpha / sigma * excess)


# --- wrappers: a denoise in, a denoise out ------------------------------------------------------


def conditioned(denoise: Denoise, **condition: Any) -> Denoise:
    """Binds a condition, for instance label=(B,) integers: the result takes (z, logsnr) alone."""
    return lambda z, logsnr: denoise(z, logsnr, **condition)


def guided(denoise: Denoise, clip: bool = False) -> Denoise:
    """Classifier-free guidance as a condition: the result takes label and guidance, each (B,).

    x_hat_w = (1 + w) x_hat(label) - w x_hat(no class), and eps_hat alike, with w = guidance (Ho &
    Salimans 2022, equation 6). Label -1 is no class. Both predictions are asked for in one call of
    twice the batch. clip: whether x_hat_w is within_range; that of both predictions is not enough.
    """

    def guided_denoise(
        z: Tensor, logsnr: Tensor, label: Tensor, guidance: Tensor, **condition: Tensor
    ) -> Prediction:
        doubled = {name: torch.cat([value, value]) for name, value in condition.items()}
        doubled["label"] = torch.cat([label, torch.full_like(label, -1)])
        prediction = denoise(torch.cat([z, z]), torch.cat([logsnr, logsnr]), **doubled)
        w = guidance.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        halves = (part.chunk(2) for part in prediction)
        moved = Prediction(*((1 + w) * known - w * free for known, free in halves))
        return within_range(moved, *alpha_sigma(logsnr, z)) if clip else moved

    return guided_denoise


def clipped(denoise: Denoise) -> Denoise:
    """Clips x_hat to [-1, 1] and recomputes eps_hat from it. For sampling only, and outermost.

    Distillation targets and losses do not clip (Salimans & Ho 2022, the original code), unless the
    Denoiser itself does.
    """

    def clipped_denoise(z: Tensor, logsnr: Tensor) -> Prediction:
        x = denoise(z, logsnr).x.clamp(-1.0, 1.0)
        return Prediction(x, eps_from_x(z, x, logsnr))

    return clipped_denoise


# --- steps --------------------------------------------------------------------------------------


def ddim_step(prediction: Prediction, logsnr_s: Float[Tensor, "b"]) -> Float[Tensor, "b ..."]:
    """One DDIM step to a lower noise level: z_s = alpha_s x_hat + sigma_s eps_hat.

    Song et al. 2021 with eta = 0; Salimans & Ho 2022, section 2. At logsnr_s = +inf it is x_hat.
    """
    return diffuse(prediction.x, prediction.eps, logsnr_s)


def posterior(
    z_t: Float[Tensor, "b ..."],
    x: Float[Tensor, "b ..."],
    logsnr_t: Float[Tensor, "b"],
    logsnr_s: Float[Tensor, "b"],
    log_variance_mix: float = 0.0,
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """Mean and variance of the ancestral step q(z_s | z_t, x), s < t (Ho et al. 2020).

    mean = r alpha_st z_t + (1 - r) alpha_s x, with r = e^(logsnr_t - logsnr_s) and
    alpha_st = sqrt((1 + e^-logsnr_t) / (1 + e^-logsnr_s)). The log variance lies between that of
    (1 - r) sigma_s^2 ("small", mix 0) and (1 - r) sigma_t^2 ("large", mix 1), linearly.
    The variance is 0 at logsnr_s = +inf, where nothing is left to be drawn.
    """
    shape = (-1, *[1] * (z_t.ndim - 1))
    softplus = torch.nn.functional.softplus
    log_r = logsnr_t - logsnr_s
    alpha_st = torch.exp(0.5 * (softplus(-logsnr_t) - softplus(-logsnr_s)))
    share = -torch.expm1(log_r)  # 1 - r
    alpha_s, _ = alpha_sigma(logsnr_s, z_t)
    mean = (log_r.exp() * alpha_st).reshape(shape).to(z_t.dtype) * z_t
    mean = mean + share.reshape(shape).to(z_t.dtype) * alpha_s * x

    last = torch.isposinf(logsnr_s)
    log_small, log_large = -softplus(logsnr_s.masked_fill(last, 0.0)), -softplus(logsnr_t)
    log_variance = share.log() + torch.lerp(log_small, log_large, log_variance_mix)
    variance = log_variance.exp().masked_fill(last, 0.0)
    return mean, variance.reshape(shape).to(z_t.dtype).expand_as(z_t)
