"""The embedding of what a network is told beside the image: noise level, class, guidance weight."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import guidance_features, linear, time_features


class Conditioned(nn.Module):
    """A network with an embedding of the noise level, the class and the guidance weight.

    features: the number of sinusoids of the noise level; width: of the embedding. num_classes:
    None for an unconditional network. guidance: whether the guidance weight is an input; its layer
    starts at zero, so that the network starts as the one without.
    """

    def __init__(self, features: int, width: int, num_classes: int | None, guidance: bool) -> None:
        super().__init__()
        self.features, self.num_classes, self.guidance = features, num_classes, guidance
        self.time_in = linear(features, width)
        self.time_out = linear(width, width)
        if num_classes is not None:
            self.class_embedding = linear(num_classes, width)
        if guidance:
            self.guidance_embedding = linear(features, width, zero=True)

    def embed(
        self,
        logsnr: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None,
        guidance: Float[Tensor, "b"] | None,
    ) -> Float[Tensor, "b e"]:
        """Returns the embedding of the noise level, the class and the guidance weight.

        Label -1 means no class: only the bias is added. Raises ValueError for a label or a guidance
        weight that the network does not take, and for a missing guidance weight.
        """
        embedding = self.time_out(F.silu(self.time_in(time_features(logsnr, self.features))))
        if (guidance is None) == self.guidance:
            wanted = "needs a" if self.guidance else "takes no"
            raise ValueError(f"this network {wanted} guidance weight")
        if guidance is not None:
            features = guidance_features(guidance.to(logsnr.dtype), self.features)
            embedding = embedding + self.guidance_embedding(features)
        if self.num_classes is None:
            if label is not None:
                raise ValueError("a label was given to a network without classes")
            return embedding
        classes = torch.arange(self.num_classes, device=logsnr.device)
        if label is None:
            label = torch.full((len(logsnr),), -1, device=logsnr.device)
        return embedding + self.class_embedding((label[:, None] == classes).to(logsnr.dtype))
