"""How good images are: distances between the features of samples and those of real images."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.features import Features
from evaluation.frechet import distances_without, frechet_distance, jackknife, limit_distance
from pipeline.codec import encode

FEWEST = 10  # samples that can be measured
CONFIDENT = 0.9
NEAREST = 1_000  # samples that are compared with the training images


@dataclass(frozen=True)
class Quality:
    """The measured quality of `count` samples against real images.

    frechet: Heusel et al. 2017; frechet_interval: half the width of its 95% interval. kernel:
    Binkowski et al. 2018. precision, recall: Kynkaanniemi et al. 2019, k = 3. confident: the share
    of samples to which the classifier gives a class with more than 90%. classes: the share of each.
    without: the Frechet distances without each of ten sets of the samples; limit: that of
    infinitely many samples.
    """

    count: int
    frechet: float
    frechet_interval: float
    kernel: float
    precision: float
    recall: float
    confident: float | None = None
    classes: list[float] | None = None
    without: list[float] | None = None
    limit: float | None = None


def measure(samples: Features, real: Features) -> Quality:
    """Returns the quality of the samples. Raises ValueError for fewer than 10 samples.

    The interval is that of the jackknife, from the distances without each of ten sets. Those of
    the sets alone would not do: a distance of few samples is mostly bias, which has its own spread.
    """
    count = len(samples.values)
    if count < FEWEST:
        raise ValueError(f"{count} samples; a distance needs at least {FEWEST}")
    distance = frechet_distance(samples.values, real.values)
    without = distances_without(samples.values, real.values)
    precision, recall = precision_and_recall(samples.values, real.values)
    logits = samples.logits
    return Quality(
        count=count,
        frechet=distance,
        frechet_interval=jackknife(distance, without).half,
        kernel=kernel_distance(samples.values, real.values),
        precision=precision,
        recall=recall,
        confident=None if logits is None else confident_share(logits),
        classes=None if logits is None else class_shares(logits),
        without=without,
        limit=limit_distance(samples.values, real.values),
    )


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Returns the squared MMD with a cubic kernel, the mean over 100 subsets (Binkowski 2018)."""
    size = min(1000, len(a) // 2, len(b) // 2)
    measured = kid_features_to_metric(
        a.double(), b.double(), kid_subset_size=size, kid_subsets=100, rng_seed=0, verbose=False
    )
    return float(measured["kernel_inception_distance_mean"])


def precision_and_recall(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]
) -> tuple[float, float]:
    """Returns precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of samples within the k-nearest-neighbour balls of real images, recall
    the share of real images within those of samples.
    """
    size = min(len(samples), len(real))  # both depend on the numbers of images
    measured = prc_features_to_metric(samples[:size], real[:size], verbose=False)
    return float(measured["precision"]), float(measured["recall"])


def confident_share(logits: Float[Tensor, "n k"]) -> float:
    """Returns the share of images that have a class with a probability above 90%."""
    return (logits.softmax(1).amax(1) > CONFIDENT).float().mean().item()


def class_shares(logits: Float[Tensor, "n k"]) -> list[float]:
    """Returns the share of each class among the images."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts / len(logits)).tolist()  # type: ignore[no-any-return]


# --- relations between sets of images -------------------------------------------------------------


def squared_distance(a: UInt8[Tensor, "n c h w"], b: UInt8[Tensor, "m c h w"]) -> float:
    """Returns the mean squared distance of pixels in [-1, 1], over the images that both have."""
    size = min(len(a), len(b))
    return (encode(a[:size]) - encode(b[:size])).square().mean().item()


def asked_share(logits: Float[Tensor, "n k"] | None, num_classes: int | None) -> float | None:
    """Returns the share of images that show the class which a conditional model was given.

    Image n was drawn for class n mod num_classes. None if the classifier knows other classes.
    """
    if logits is None or num_classes != logits.shape[1]:
        return None
    asked = torch.arange(len(logits)) % num_classes
    return (logits.argmax(1) == asked).float().mean().item()


def agreement(a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> float:
    """Returns the share of images with the same most likely class in both."""
    size = min(len(a), len(b))
    return (a[:size].argmax(1) == b[:size].argmax(1)).float().mean().item()


# --- what the eye does not see --------------------------------------------------------------------

FAINT = (1, 30)  # values of pixels, of 255, that are hard to tell from black
BORDER = 2  # pixels along the edge, which are black in nearly all digits


def background(images: UInt8[Tensor, "n c h w"]) -> tuple[float, float]:
    """Returns the share of faint pixels, and the mean value, of 255, along the edge.

    Of digits on black these measure the noise in the background, to which features may be sensitive
    although nobody sees it.
    """
    low, high = FAINT
    faint = ((images >= low) & (images <= high)).float().mean().item()
    inner = images[:, :, BORDER:-BORDER, BORDER:-BORDER]
    around = images.double().sum() - inner.double().sum()
    return faint, (around / (images.numel() - inner.numel())).item()


# --- memorised training images --------------------------------------------------------------------


def nearest(
    images: Float[Tensor, "n d"], training: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Returns each image's distance to the nearest training image, and that one's index."""
    squares = training.square().sum(1)
    distances, indices = [], []
    for part in images.split(250):
        squared = part.square().sum(1)[:, None] + squares - 2 * part @ training.T
        found = squared.min(1)
        distances.append(found.values.clamp_min(0).sqrt())
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def share_nearer(samples: Float[Tensor, "n"], real: Float[Tensor, "m"]) -> float:
    """Returns the share of samples with a distance below the 1% quantile of real images."""
    return (samples < real.quantile(0.01)).float().mean().item()


def flat(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Returns the images as vectors of pixels in [0, 1]."""
    return images.flatten(1).float() / 255
