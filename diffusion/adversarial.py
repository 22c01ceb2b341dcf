"""The adversarial term: a critic learns to tell where a student's steps end from real images.

A step of the student from noise level t to s should end at a sample of q(z_s), as a real image
noised to s is. Both are noised further, to a random level m, and a critic D, which is trained at
the same time, compares them (Goodfellow et al. 2014, with the non-saturating loss; on noised images
Xiao et al. 2022, equation 4):

    student: softplus(-D(z_m)),    critic: softplus(D(z_m)) + softplus(-D(y_m)) + penalty

z of the student, y of real images. D sees the features of a frozen diffusion model (Sauer et al.
2024, LADD). A student that only follows its teacher cannot be better than the teacher's samples;
with this term it can.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from diffusion.gaussian import ddim_step, diffuse
from diffusion.losses import Example
from diffusion.schedule import alpha_sigma

Features = Callable[..., list[Tensor]]
"""(z, logsnr, **condition) -> feature maps of a frozen network."""

LEAST, MOST = 0.03, 0.63  # of the way from s to nothing but noise: where the critic looks
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
    def draw(rng: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        """Returns what the loss draws at random, for images of this shape (B, ...)."""
        names = ("of_real", "further", "further_real", "nudge", "nudge_real")
        drawn = {n: torch.randn(shape, generator=rng, device=rng.device) for n in names}
        return drawn | {"share": torch.rand(shape[0], generator=rng, device=rng.device)}

    def loss(
        self, example: Example, condition: dict[str, Tensor], drawn: dict[str, Tensor]
    ) -> Float[Tensor, "b"]:
        """Returns the student's term for each example; its gradient trains the critic as well.

        condition: of the frozen network. No gradient of the student's term reaches the critic, and
        none of the critic's reaches the student, although one backward pass computes both. The
        critic's term is not part of the value.
        """
        end = example.end
        level = further_level(end, LEAST + (MOST - LEAST) * drawn["share"].to(end.dtype))
        fake = noise_further(ddim_step(example.prediction, end), drawn["further"], end, level)
        real = diffuse(example.x, drawn["of_real"], end)
        real = noise_further(real, drawn["further_real"], end, level)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        judged = functional_call(self.critic, frozen, (self.features(fake, level, **condition),))
        critics = self._critics_loss(fake.detach(), real, level, condition, drawn)
        return self.weight * F.softplus(-judged).mean(1) + (critics - critics.detach())

    def _critics_loss(
        self,
        fake: Tensor,
        real: Tensor,
        level: Float[Tensor, "b"],
        condition: dict[str, Tensor],
        drawn: dict[str, Tensor],
    ) -> Float[Tensor, "b"]:
        """The critic's loss: it should know real from fake, and hardly change with faint noise.

        The penalty is that of Mescheder et al. 2018 on the gradient, with the gradient replaced by
        a difference, which needs no second derivative (Lin et al. 2025, APT).
        """
        noisy = (fake + NUDGE * drawn["nudge"], real + NUDGE * drawn["nudge_real"])
        repeated = {name: value.repeat(4) for name, value in condition.items()}
        with torch.no_grad():
            features = self.features(torch.cat([fake, real, *noisy]), level.repeat(4), **repeated)
        of_fake, of_real, *of_noisy = self.called(features).chunk(4)
        changes = [(a - b).square() for a, b in zip((of_fake, of_real), of_noisy, strict=True)]
        penalty = PENALTY * torch.stack(changes).sum(0) / NUDGE**2
        return (F.softplus(of_fake) + F.softplus(-of_real) + penalty).mean(1)
