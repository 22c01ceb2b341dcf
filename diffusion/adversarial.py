"""The adversarial term: a critic learns to tell a student's samples from real images.

From where its step ended the student goes on, in its own steps, to a sample. The sample and a real
image are noised to a random level m, and a critic D, which is trained at the same time, compares
them (Goodfellow et al. 2014, with the non-saturating loss; on noised images: Xiao et al. 2022):

    student: softplus(-D(z_m)),    critic: softplus(D(z_m)) + softplus(-D(y_m)) + penalty

z of the student, y of real images. D sees the features of a frozen diffusion model (Sauer et al.
2024, LADD). The gradient passes through all steps of the student. A student that only follows its
teacher cannot be better than the teacher's samples; with this term it can.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from diffusion.gaussian import Denoise, ddim_step, diffuse
from diffusion.losses import Example
from diffusion.paths import Paths
from diffusion.schedule import alpha_sigma

Features = Callable[..., list[Tensor]]
"""(z, logsnr, **condition) -> feature maps of a frozen network."""

Named = dict[str, Shaped[Tensor, "b *_"]]
"""Tensors with a row for each image."""

LEAST, MOST = 0.03, 0.63  # of the way to nothing but noise: where the critic looks
LEAST_NOISE = 20.0  # the logsnr that a network is asked for where its answer is not used
NUDGE = 0.05  # the standard deviation of the penalty's noise
PENALTY = 0.01


def further_level(logsnr: Float[Tensor, "b"], share: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """The level so far on the way from this one to nothing but noise, in atan(sigma / alpha)."""
    angle = torch.atan(torch.exp(-0.5 * logsnr))
    return -2.0 * torch.log(torch.tan(angle + share * (0.5 * math.pi - angle)))


def noise_further(
    z_s: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    logsnr_s: Float[Tensor, "b"],
    logsnr_m: Float[Tensor, "b"],
) -> Float[Tensor, "b ..."]:
    """A sample of q(z_m | z_s) at a noisier level m (Kingma et al. 2021, appendix A).

    z_m = r z_s + sqrt(sigma_m^2 - r^2 sigma_s^2) noise, r = alpha_m / alpha_s.
    """
    alpha_s, sigma_s = alpha_sigma(logsnr_s, z_s)
    alpha_m, sigma_m = alpha_sigma(logsnr_m, z_s)
    r = alpha_m / alpha_s
    return r * z_s + (sigma_m**2 - (r * sigma_s) ** 2).clamp(min=0.0).sqrt() * noise


def onward(paths: Paths) -> Paths:
    """The levels that a student passes from the end of each transition on, (n, M).

    Column i begins with the end of transition i, goes on with that of the one which starts there,
    and so on; the last level is repeated where others take longer.
    """
    starts, ends = paths[0].tolist(), paths[-1].tolist()
    follows = dict(zip(starts, ends, strict=True))
    columns = [[end] for end in ends]
    for column in columns:
        while column[-1] in follows:
            column.append(follows[column[-1]])
    longest = max(map(len, columns))
    padded = [column + column[-1:] * (longest - len(column)) for column in columns]
    return torch.tensor(padded, dtype=paths.dtype, device=paths.device).T


def walk_on(
    student: Denoise, z: Float[Tensor, "b ..."], levels: Float[Tensor, "n b"]
) -> Float[Tensor, "b ..."]:
    """Where the student's DDIM steps through these levels end, with gradients through all of them.

    A step between equal levels changes nothing.
    """
    for here, there in pairwise(levels):
        moves = (here != there).reshape(-1, *[1] * (z.ndim - 1))
        prediction = student(z, here.clamp(max=LEAST_NOISE))
        z = torch.where(moves, ddim_step(prediction, there), z)
    return z


@dataclass(frozen=True)
class Adversary:
    """A critic in training, and the loss that it adds to a student's.

    critic: feature maps -> values (B, n); called: the same, as its own loss calls it (wrapped for
    several processes). features: of a frozen network. weight: of the student's term.
    """

    critic: nn.Module
    called: Callable[[list[Tensor]], Tensor]
    features: Features
    weight: float

    @staticmethod
    def draw(rng: torch.Generator, shape: torch.Size) -> Named:
        """Returns what the loss draws at random, for images of this shape (B, ...)."""
        names = ("further", "of_real", "nudge", "nudge_real")
        drawn = {n: torch.randn(shape, generator=rng, device=rng.device) for n in names}
        return drawn | {"share": torch.rand(shape[0], generator=rng, device=rng.device)}

    def loss(
        self,
        example: Example,
        student: Denoise,
        levels: Float[Tensor, "n b"],
        condition: Named,
        drawn: Named,
    ) -> Float[Tensor, "b"]:
        """Returns the student's term for each example; its gradient trains the critic as well.

        levels: those that the student passes from the end of its step on (onward). condition: of
        the frozen network. No gradient of the student's term reaches the critic, and none of the
        critic's reaches the student, although one backward pass computes both. The critic's term is
        not part of the value.
        """
        end = levels[-1]
        level = further_level(end, LEAST + (MOST - LEAST) * drawn["share"].to(end.dtype))
        sample = walk_on(student, ddim_step(example.prediction, levels[0]), levels)
        fake = noise_further(sample, drawn["further"], end, level)
        real = diffuse(example.x, drawn["of_real"], level)

        def seen(*images: Tensor) -> list[Tensor]:
            many = {name: value.repeat(len(images)) for name, value in condition.items()}
            return self.features(torch.cat(images), level.repeat(len(images)), **many)

        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        judged = functional_call(self.critic, frozen, (seen(fake),))
        critics = self._critics_loss(fake.detach(), real, seen, drawn)
        return self.weight * F.softplus(-judged).mean(1) + (critics - critics.detach())

    def _critics_loss(
        self,
        fake: Tensor,
        real: Tensor,
        seen: Callable[..., list[Tensor]],
        drawn: Named,
    ) -> Float[Tensor, "b"]:
        """The critic's loss: it should know real from fake, and hardly change with faint noise.

        The penalty is that of Mescheder et al. 2018 on the gradient, with the gradient replaced by
        a difference, which needs no second derivative (Lin et al. 2025, APT).
        """
        noisy = (fake + NUDGE * drawn["nudge"], real + NUDGE * drawn["nudge_real"])
        with torch.no_grad():
            features = seen(fake, real, *noisy)
        of_fake, of_real, *of_noisy = self.called(features).chunk(4)
        changes = [(a - b).square() for a, b in zip((of_fake, of_real), of_noisy, strict=True)]
        penalty = PENALTY * torch.stack(changes).sum(0) / NUDGE**2
        return (F.softplus(of_fake) + F.softplus(-of_real) + penalty).mean(1)
