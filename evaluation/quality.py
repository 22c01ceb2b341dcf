"""How good images are: distances between the features of samples and those of real images."""

import statistics
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.features import Features

NOISE_SETS = 5  # disjoint parts of the samples, between which a distance varies
STUDENT_T = 2.776  # of 95%, for the mean of five
CONFIDENT = 0.9
NEAREST = 1_000  # samples whose nearest training images are looked for


@dataclass(frozen=True)
class Quality:
    """Of samples, against real images.

    frechet: Heusel et al. 2017; interval: half the width of its 95% interval. kernel: Binkowski et
    al. 2018. precision, recall: Kynkaanniemi et al. 2019, k = 3. confident: the share of digits
    whose class the classifier is more than 90% sure of. classes: their shares by class.
    """

    count: int
    frechet: float
    frechet_interval: float
    kernel: float
    precision: float
    recall: float
    confident: float | None = None
    classes: list[float] | None = None


def measure(samples: Features, real: Features) -> Quality:
    """All of Quality. Raises ValueError for fewer than 10 samples.

    The interval: five disjoint parts of the samples, each from noise of its own, have five
    distances whose mean has a standard error; Student's t for five makes it an interval. A distance
    of fewer samples is larger (its bias falls with their number): the parts give the spread alone.
    """
    count = len(samples.values)
    if count < 2 * NOISE_SETS:
        raise ValueError(f"{count} samples; a distance needs at least {2 * NOISE_SETS}")
    parts = samples.values[: count - count % NOISE_SETS].chunk(NOISE_SETS)
    spread = statistics.stdev(frechet_distance(part, real.values) for part in parts)
    precision, recall = precision_and_recall(samples.values, real.values)
    logits = samples.logits
    return Quality(
        count=count,
        frechet=frechet_distance(samples.values, real.values),
        frechet_interval=STUDENT_T * spread / NOISE_SETS**0.5,
        kernel=kernel_distance(samples.values, real.values),
        precision=precision,
        recall=recall,
        confident=None if logits is None else confident_share(logits),
        classes=None if logits is None else class_shares(logits),
    )


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features."""
    statistics_of = [fid_features_to_statistics(x.double()) for x in (a, b)]
    distance = fid_statistics_to_metric(*statistics_of, False)["frechet_inception_distance"]
    return max(0.0, float(distance))  # rounding may go below


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """The squared maximum mean discrepancy of a cubic kernel, the mean over 100 subsets."""
    size = min(1000, len(a) // 2, len(b) // 2)
    measured = kid_features_to_metric(
        a.double(), b.double(), kid_subset_size=size, kid_subsets=100, rng_seed=0, verbose=False
    )
    return float(measured["kernel_inception_distance_mean"])


def precision_and_recall(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]
) -> tuple[float, float]:
    """The share of samples among real images' neighbours, and of real ones among samples'."""
    size = min(len(samples), len(real))  # both depend on how many there are
    measured = prc_features_to_metric(samples[:size], real[:size], verbose=False)
    return float(measured["precision"]), float(measured["recall"])


def confident_share(logits: Float[Tensor, "n k"]) -> float:
    """The share of images whose class is more than 90% sure."""
    return (logits.softmax(1).amax(1) > CONFIDENT).float().mean().item()


def class_shares(logits: Float[Tensor, "n k"]) -> list[float]:
    """The share of each class among the images."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts / len(logits)).tolist()  # type: ignore[no-any-return]


# --- memory ---------------------------------------------------------------------------------------


def nearest(
    images: Float[Tensor, "n d"], training: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The distance of each to the nearest of the training images, and which that is."""
    squares = training.square().sum(1)
    distances, indices = [], []
    for part in images.split(250):
        all_of_them = part.square().sum(1)[:, None] + squares - 2 * part @ training.T
        found = all_of_them.min(1)
        distances.append(found.values.clamp_min(0).sqrt())
        indices.append(found.indices.float())
    return torch.cat(distances), torch.cat(indices)


def share_nearer(samples: Float[Tensor, "n"], real: Float[Tensor, "m"]) -> float:
    """The share of samples that are nearer than all but 1% of real images."""
    return (samples < real.quantile(0.01)).float().mean().item()


def flat(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Pixels in [0, 1] as vectors."""
    return images.flatten(1).float() / 255
