import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.gaussian import Prediction, diffuse, eps_from_x
from diffusion.losses import (
    LOSSES,
    SQUARED_ERRORS,
    Example,
    energy,
    perceptual,
    pseudo_huber,
    weighted_sum,
)
from diffusion.objectives import denoising_loss
from diffusion.random_features import feature_maps
from tests.toys import STUDENTS

WEIGHTS = {
    "constant": lambda snr: torch.ones_like(snr),
    "snr": lambda snr: snr,
    "snr_trunc": lambda snr: snr.clamp(min=1.0),
    "snr_plus_one": lambda snr: 1 + snr,
    "snr_capped": lambda snr: (1 + snr).clamp(max=25.0),
}


@given(st.sampled_from(sorted(SQUARED_ERRORS)), st.floats(-10, 10), st.integers(0, 2**31))
def test_a_loss_is_its_weight_times_the_squared_error_of_x(name, level, seed):
    assert WEIGHTS.keys() == SQUARED_ERRORS.keys()
    rng = torch.Generator().manual_seed(seed)
    z, x, x_hat = torch.randn(3, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    logsnr = torch.full((4,), level, dtype=torch.float64)
    prediction, target = (Prediction(y, eps_from_x(z, y, logsnr)) for y in (x_hat, x))
    expected = WEIGHTS[name](logsnr.exp()) * (x_hat - x).square().mean((1, 2, 3))
    loss = LOSSES[name](Example(prediction, target, x, logsnr, end=logsnr))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@given(st.floats(-10, 10), st.floats(1e-9, 2), st.integers(0, 2**31))
def test_the_pseudo_huber_loss_is_a_root_that_is_smooth_at_zero(level, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    x, error = torch.randn(2, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    logsnr = torch.full((4,), level, dtype=torch.float64)
    x_hat = (x + scale * error).requires_grad_()
    eps, eps_hat = (-(logsnr / 2).exp().reshape(-1, 1, 1, 1) * y for y in (x, x_hat))
    loss = pseudo_huber(Example(Prediction(x_hat, eps_hat), Prediction(x, eps), x, logsnr, logsnr))
    s = max(1.0, logsnr.exp()[0].item()) * (scale * error).square().mean((1, 2, 3))
    # (loss + c)^2 = s + c^2, c = 0.00054
    torch.testing.assert_close(loss.square() + 0.00108 * loss, s, rtol=1e-6, atol=1e-14)
    loss.sum().backward()
    assert x_hat.grad.isfinite().all()


def test_the_denoising_loss_is_the_error_at_z_t():
    x, eps = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    logsnr = torch.linspace(-20, 20, 5, dtype=torch.float64)
    loss = denoising_loss(STUDENTS["v"], x, eps, logsnr, LOSSES["snr_plus_one"])
    z = diffuse(x, eps, logsnr)
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    v = alpha.reshape(-1, 1, 1, 1) * eps - sigma.reshape(-1, 1, 1, 1) * x
    error = STUDENTS["v"].network(z, logsnr) - v
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3)))


@pytest.mark.parametrize("output_type", STUDENTS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_in_float32_over_the_whole_range(name, output_type):
    x, eps = torch.randn(2, 41, 1, 4, 4)
    logsnr = torch.linspace(-20, 20, 41, dtype=torch.float64)
    loss = denoising_loss(STUDENTS[output_type], x, eps, logsnr, LOSSES[name])
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()


def example(x_hat, x, is_sample=None, target=None):
    logsnr = torch.full((len(x),), -3.0, dtype=x.dtype)
    end = torch.full_like(logsnr, torch.inf)
    if is_sample is not None:
        end = torch.where(is_sample, end, 0.0)
    target = x if target is None else target
    return Example(
        Prediction(x_hat, torch.zeros_like(x)),
        Prediction(target, torch.zeros_like(x)),
        x,
        logsnr,
        end,
    )


def test_a_weighted_sum_is_the_sum_of_its_terms():
    x_hat, x = torch.randn(2, 5, 1, 8, 8)
    one = example(x_hat, x)
    loss = weighted_sum({"constant": 2.0, "perceptual": 0.5})(one)
    torch.testing.assert_close(loss, 2 * LOSSES["constant"](one) + 0.5 * perceptual(one))
    assert torch.equal(weighted_sum({"constant": 1.0})(one), LOSSES["constant"](one))


def test_the_perceptual_distance_is_that_to_the_target_in_random_features():
    x_hat, x, target = torch.randn(3, 2, 1, 8, 8)
    loss = perceptual(example(x_hat, x, target=target))
    assert torch.equal(loss, perceptual(example(x_hat, target, target=target))), "not to the image"
    by_map = []
    for maps in zip(feature_maps(x_hat), feature_maps(target), strict=True):
        for a, b in zip(*maps, strict=True):
            a, b = (m / m.square().sum(1, keepdim=True).sqrt() for m in (a, b))
            by_map.append((a - b).square().sum(1).mean((1, 2)))
    torch.testing.assert_close(loss, torch.stack(by_map).mean(0))


def test_the_energy_distance_is_that_to_the_images():
    x_hat, x, target = torch.randn(3, 4, 1, 8, 8)
    near, far = (energy(example(x_hat, x, target=t)) for t in (x, target))
    assert torch.equal(near, far), "not to the target"
    assert not torch.equal(near, energy(example(x_hat, target, target=x)))


def blobs(count, spread, rng):
    """Images of one bright square each, at places that vary with the spread."""
    x = -torch.ones(count, 1, 16, 16, dtype=torch.float64)
    for image in x:
        row, column = (4 + spread * torch.rand(2, generator=rng)).long().tolist()
        image[0, row : row + 4, column : column + 4] = 1
    return x


def test_the_energy_distance_is_zero_between_samples_of_one_kind_and_not_between_two():
    rng = torch.Generator().manual_seed(0)
    real, same, collapsed = (blobs(96, spread, rng) for spread in (8, 8, 1))
    alike = energy(example(same, real)).mean()
    different = energy(example(collapsed, real)).mean()
    assert alike.abs() < 0.1 * different
    assert different > 0


def test_the_energy_distance_is_the_formula_over_pairs_of_different_images():
    from diffusion.random_features import feature_vectors

    x_hat, x = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    chosen = torch.tensor([True, False, True, True])
    expected = []
    for f, r in zip(feature_vectors(x_hat), feature_vectors(x), strict=True):
        cross = [(f[i] - r[j]).norm() for i in (0, 2, 3) for j in range(4) if i != j]
        own = [(f[i] - f[j]).norm() for i in (0, 2, 3) for j in (0, 2, 3) if i != j]
        real = [(r[i] - r[j]).norm() for i in range(4) for j in range(4) if i != j]
        means = [torch.stack(values).mean() for values in (cross, own, real)]
        expected.append(2 * means[0] - means[1] - means[2])
    found = energy(example(x_hat, x, chosen))
    assert found[1] == 0
    torch.testing.assert_close(found.sum() / 3, torch.stack(expected).mean())
    assert (energy(example(x_hat, x, torch.arange(4) == 2)) == 0).all()


@pytest.mark.parametrize("name", ["energy", "perceptual", "pseudo_huber"])
@pytest.mark.parametrize("size", [8, 32])
def test_losses_with_roots_have_finite_gradients_where_images_are_equal(name, size):
    x = torch.randn(3, 3, size, size)
    x_hat = x.clone().requires_grad_()
    LOSSES[name](example(x_hat, x)).sum().backward()
    assert x_hat.grad.isfinite().all()


def test_the_perceptual_distance_grows_with_the_difference():
    x, noise = torch.randn(2, 4, 1, 16, 16)
    values = [perceptual(example(x + s * noise, x)).mean() for s in (0.0, 0.1, 0.5)]
    assert values[0] == 0
    assert values[0] < values[1] < values[2]


def test_the_energy_distance_of_a_single_image_is_zero_and_so_is_its_gradient():
    x_hat, x = torch.randn(2, 1, 1, 8, 8)
    loss = energy(example(x_hat.requires_grad_(), x))
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert (x_hat.grad == 0).all()
