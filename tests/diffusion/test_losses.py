import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.gaussian import Prediction, diffuse, eps_from_x
from diffusion.losses import LOSSES, Example, weighted_sum
from diffusion.objectives import denoising_loss
from tests.toys import STUDENTS

WEIGHTS = {
    "constant": lambda snr: torch.ones_like(snr),
    "snr": lambda snr: snr,
    "snr_trunc": lambda snr: snr.clamp(min=1.0),
    "snr_plus_one": lambda snr: 1 + snr,
}


@given(st.sampled_from(sorted(LOSSES)), st.floats(-10, 10), st.integers(0, 2**31))
def test_a_loss_is_its_weight_times_the_squared_error_of_x(name, level, seed):
    assert WEIGHTS.keys() == LOSSES.keys()
    rng = torch.Generator().manual_seed(seed)
    z, x, x_hat = torch.randn(3, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    logsnr = torch.full((4,), level, dtype=torch.float64)
    prediction, target = (Prediction(y, eps_from_x(z, y, logsnr)) for y in (x_hat, x))
    expected = WEIGHTS[name](logsnr.exp()) * (x_hat - x).square().mean((1, 2, 3))
    no_samples = torch.zeros(4, dtype=torch.bool)
    loss = LOSSES[name](Example(prediction, target, x, logsnr, no_samples))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


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
