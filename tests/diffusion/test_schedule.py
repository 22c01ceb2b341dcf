import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.schedule import alpha_sigma, cosine_logsnr, make_schedule
from tests.toys import golden


def test_cosine_schedule_is_the_reference():
    reference = golden("schedules.npz")
    logsnr = cosine_logsnr(reference["u"])
    torch.testing.assert_close(logsnr, reference["cosine_logsnr"], rtol=1e-9, atol=1e-12)
    images = torch.zeros(len(logsnr), 1, 1, 1, dtype=torch.float64)
    alpha, sigma = alpha_sigma(logsnr, images)
    torch.testing.assert_close(alpha.flatten(), reference["alpha"], rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma.flatten(), reference["sigma"], rtol=1e-9, atol=0)


@given(st.floats(-30, -1), st.floats(1, 30))
def test_the_range_lies_inside_the_schedule(low, high):
    logsnr = make_schedule("cosine", low, high)(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert logsnr[0] == pytest.approx(high, rel=1e-6)
    assert logsnr[-1] == pytest.approx(low, rel=1e-6)
    assert (logsnr.diff() < 0).all()


def test_alpha_and_sigma_at_infinity_and_in_other_precisions():
    images = torch.zeros(3, 1, 2, 2)
    levels = torch.tensor([-20.0, 0.0, torch.inf], dtype=torch.float64)
    alpha, sigma = alpha_sigma(levels, images)
    assert alpha.dtype == torch.float32
    assert alpha.shape == (3, 1, 1, 1)
    assert (alpha[2], sigma[2]) == (1, 0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, 1, 1, 1))
    assert alpha[0].item() == pytest.approx(4.5398e-5, rel=1e-4)
