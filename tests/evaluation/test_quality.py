import statistics

import pytest
import torch
from safetensors import safe_open

from evaluation.digits import (
    NUM_FEATURES,
    TRAINED_ON,
    WEIGHTS,
    accuracy,
    load_digit_network,
    moved,
    train,
)
from evaluation.features import Features, brightness, make_extractor
from evaluation.quality import (
    agreement,
    class_shares,
    confident_share,
    flat,
    frechet_distance,
    kernel_distance,
    measure,
    nearest,
    precision_and_recall,
    share_nearer,
    squared_distance,
)
from pipeline.data import fit, read_mnist
from pipeline.engine import allow_tf32
from pipeline.sections import EngineConfig
from utils.command import InputError
from utils.randomness import generator

CPU = torch.device("cpu")


def features(count=400, dim=8, seed=0, scale=1.0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(count, dim, generator=rng) @ mix + shift


@pytest.fixture(scope="module")
def test_digits(request):
    root = request.config.rootpath / "data" / "mnist"
    images, labels = read_mnist(root, "t10k")
    return fit(images[:, None], 32, 1), labels


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def test_the_frechet_distance_equals_an_independent_one():
    """tr (A B)^(1/2) by the symmetric form (A^(1/2) B A^(1/2))^(1/2), float64, own covariances."""
    a, b = features(seed=1).double(), features(seed=2, scale=1.4, shift=0.3).double()
    difference = a.mean(0) - b.mean(0)
    centred = [x - x.mean(0) for x in (a, b)]
    first, second = (c.T @ c / (len(c) - 1) for c in centred)
    root = square_root(first)
    between = square_root(root @ second @ root)
    expected = difference.square().sum() + (first + second - 2 * between).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_the_frechet_distance_of_gaussians_in_closed_form():
    """Independent coordinates: the sum of squared differences of means and of deviations."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=rng) * torch.tensor([1.0, 3.0])
    b = torch.randn(200_000, 2, generator=rng) * torch.tensor([2.0, 3.5]) + 1.0
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1 + 0.25, rel=0.02)


def test_identical_sets_are_at_no_distance():
    a = features()
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)
    assert kernel_distance(a, a) <= 1e-6
    assert precision_and_recall(a, a) == (1.0, 1.0)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_more_noise_is_further_away(distance):
    real, others = features(seed=1), features(seed=2)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(3))
    distances = [distance(others + level * noise, real) for level in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_more_noise_on_digits_is_further_away(test_digits):
    """Through the digit network."""
    images, _ = test_digits
    extract = make_extractor("digits", CPU)
    real, rng = extract(images[:1000]), torch.Generator().manual_seed(0)
    noise = torch.randn(images[1000:2000].shape, generator=rng)
    measured = []
    for level in (0, 8, 16, 32, 64, 128):
        noisy = (images[1000:2000] + level * noise).clamp(0, 255).to(torch.uint8)
        measured.append(measure(extract(noisy), real))
    assert [q.frechet for q in measured] == sorted(q.frechet for q in measured)
    assert measured[0].frechet < 0.2 * measured[-1].frechet
    assert measured[0].confident > 0.98
    assert measured[0].precision > measured[3].precision


def test_precision_and_recall_tell_lacking_quality_from_lacking_variety():
    real = features(count=600, seed=1)
    narrow = real[:600] * 0.05
    precise, recalled = precision_and_recall(narrow, real)
    assert precise > 0.9
    assert recalled < 0.2
    precise, _ = precision_and_recall(real * 20.0, real)
    assert precise < 0.2


def test_the_interval_covers_the_spread_of_fresh_noise():
    """Of twenty sets, most of the distances lie within their interval around the mean of all."""
    real = Features(features(count=1000, seed=1), None)
    qualities = [measure(Features(features(count=250, seed=s), None), real) for s in range(10, 30)]
    middle = sum(q.frechet for q in qualities) / len(qualities)
    inside = sum(abs(q.frechet - middle) <= q.frechet_interval for q in qualities)
    assert inside >= 16
    spread = statistics.stdev(q.frechet for q in qualities)
    widths = [q.frechet_interval for q in qualities]
    assert 1.5 * spread < sum(widths) / len(widths) < 4.5 * spread


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 10"):
        measure(Features(features(count=9), None), Features(features(), None))


def test_shares_of_classes_and_of_sure_ones():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.1, 0.0], [9.0, 0.0]])
    assert class_shares(logits) == [0.75, 0.25]
    assert confident_share(logits) == 0.75


def test_copies_of_training_images_are_found():
    rng = torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (500, 1, 4, 4), generator=rng, dtype=torch.uint8)
    fresh = torch.randint(0, 256, (300, 1, 4, 4), generator=rng, dtype=torch.uint8)
    samples = torch.cat([training[40:60], fresh[:80]])
    distances, indices = nearest(flat(samples), flat(training))
    assert indices[:20].tolist() == list(range(40, 60))
    assert distances[:20].amax() < 1e-2
    expected = torch.cdist(flat(fresh), flat(training)).min(1)
    torch.testing.assert_close(nearest(flat(fresh), flat(training))[0], expected.values)
    real = nearest(flat(fresh[100:]), flat(training))[0]
    assert 0.2 <= share_nearer(distances, real) <= 0.25


# --- the digit network ----------------------------------------------------------------------------


def test_the_digit_network_recognises_digits(test_digits):
    images, labels = test_digits
    network = load_digit_network(CPU)
    assert accuracy(network, images, labels) >= 0.993
    assert NUM_FEATURES <= 128
    assert TRAINED_ON == 50_000
    assert not any(p.requires_grad for p in network.parameters())
    with safe_open(WEIGHTS, "pt") as file:
        assert "accuracy" in file.metadata()


def test_features_are_not_rounded_as_the_samples_before_them(test_digits):
    allow_tf32(EngineConfig(tf32=True))
    make_extractor("digits", CPU)(test_digits[0][:10])
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_the_brightness_of_a_digit_does_not_depend_on_its_colour(test_digits):
    digits = test_digits[0][:200]
    rng = torch.Generator().manual_seed(0)
    colors = torch.rand(200, 3, 1, 1, generator=rng)
    colors = colors / colors.amax(1, keepdim=True)
    coloured = (digits * colors).round().to(torch.uint8)
    difference = brightness(coloured).int() - digits.int()
    assert difference.abs().max() <= 1, "but for the rounding"
    assert torch.equal(brightness(digits), digits), "one channel"
    assert torch.equal(brightness(digits.expand(-1, 3, -1, -1)), digits), "white"
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert torch.equal(brightness(black), black[:, :1])
    noise = 20 * torch.randn(coloured.shape, generator=rng)
    noisy = (digits * colors + noise + 50).clamp(0, 255).to(torch.uint8)  # on grey: no clipping
    shifted = (digits * colors + 50).clamp(0, 255).to(torch.uint8)
    bias = brightness(noisy).float().mean() - brightness(shifted).float().mean()
    assert abs(bias) < 2, "the largest channel of noise would add 17"


def test_the_digit_network_learns_and_its_training_is_a_function_of_the_seed(test_digits):
    images, labels = test_digits
    one, two = (train(images[:400], labels[:400], epochs=10) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert accuracy(one, images[400:1400], labels[400:1400]) > 0.5


def test_digits_are_moved_a_little(test_digits):
    x = test_digits[0][:50].float() / 127.5 - 1
    y = moved(x, generator("cpu", 0))
    assert y.shape == x.shape
    assert not torch.equal(x, y)
    assert (y.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().amax() < 0.15


def test_missing_weights_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"digits\.safetensors: missing or damaged; restore it"):
        load_digit_network(CPU, tmp_path / "digits.safetensors")
    with pytest.raises(InputError, match="--features vgg: not one of digits, inception"):
        make_extractor("vgg", CPU)


# --- relations between sets of images -------------------------------------------------------------


def test_sets_are_compared_image_by_image_in_the_models_range():
    black = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    assert squared_distance(black, white) == 4.0
    mixed = torch.cat([black[:1], white[1:], white])  # two of the first three differ
    assert squared_distance(black, mixed) == squared_distance(mixed, black) == pytest.approx(8 / 3)


def test_agreement_is_the_share_of_equal_classes():
    logits = 5 * torch.eye(4)
    assert agreement(logits, logits) == 1.0
    assert agreement(logits, logits[[0, 1, 3, 2]]) == 0.5
    assert agreement(logits[:3], logits[[1, 0, 2, 2]]) == pytest.approx(1 / 3)
