import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.gaussian import (
    OUTPUT_TYPES,
    Denoiser,
    Prediction,
    clipped,
    conditioned,
    ddim_step,
    diffuse,
    eps_from_x,
    guided,
    posterior,
    velocity,
)
from diffusion.losses import constant, snr, snr_plus_one
from diffusion.objectives import denoising_loss
from diffusion.schedule import alpha_sigma
from tests.toys import STUDENTS, golden, saying, student_v, student_x


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def reference():
    return golden("dpm_math.npz")


def test_conversions_are_the_reference(reference):
    z, x, eps, v, logsnr = (reference[key] for key in ("z", "x", "eps", "v", "logsnr"))
    alpha, sigma = alpha_sigma(logsnr, z)
    close(OUTPUT_TYPES["eps"].decode(eps, z, alpha, sigma).x, reference["predict_x_from_eps"])
    close(OUTPUT_TYPES["v"].decode(v, z, alpha, sigma).x, reference["predict_x_from_v"])
    close(eps_from_x(z, x, logsnr), reference["predict_eps_from_x"])
    close(velocity(Prediction(x, eps), logsnr), reference["predict_v_from_x_and_eps"])


def test_forward_process_is_the_reference(reference):
    x, eps, logsnr = reference["x"], reference["eps"], reference["logsnr"]
    mean, std = reference["forward/mean"], reference["forward/std"]
    close(diffuse(x, eps, logsnr), mean + std * eps)
    close(diffuse(x, torch.zeros_like(x), logsnr), mean)


@pytest.mark.parametrize(("name", "mix"), [("small", 0.0), ("large", 1.0), ("medium_0.3", 0.3)])
def test_reverse_process_is_the_reference(reference, name, mix):
    mean, variance = posterior(
        reference["z"], reference["x"], reference["logsnr_t"], reference["logsnr_s"], mix
    )
    close(mean, reference[f"reverse_{name}/mean"])
    close(variance, reference[f"reverse_{name}/var"])
    close(variance.sqrt(), reference[f"reverse_{name}/std"])


@pytest.mark.parametrize("output_type", ["x", "eps", "v", "both"])
@pytest.mark.parametrize("clip", [False, True])
def test_predictions_are_the_reference(reference, output_type, clip):
    denoise = clipped(STUDENTS[output_type]) if clip else STUDENTS[output_type]
    logsnr = reference["logsnr"]
    prediction = denoise(reference["z"], logsnr)
    where = f"run_model/{output_type}/clip{int(clip)}"
    close(prediction.x, reference[f"{where}/model_x"])
    # eps = (z - alpha x) / sigma cancels where sigma is 4.5e-5
    close(prediction.eps, reference[f"{where}/model_eps"], rtol=1e-9, atol=1e-10)
    close(velocity(prediction, logsnr), reference[f"{where}/model_v"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gate", [-40.0, 0.0, 40.0])
def test_a_dual_output_is_x_where_its_gate_is_open_and_v_where_it_is_shut(gate):
    z, logsnr = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([-3.0, 0.0, 7.0])
    z, logsnr = z.requires_grad_(), logsnr.double()
    parts = [student_x(z, logsnr), student_v(z, logsnr), torch.full_like(z, gate)]
    found = Denoiser(lambda *_: torch.cat(parts, dim=1), "dual")(z, logsnr)
    g = 1 / (1 + math.exp(-gate))
    for n in range(2):
        by_x, by_v = (STUDENTS[name](z, logsnr)[n] for name in ("x", "v"))
        close(found[n], g * by_x + (1 - g) * by_v)


@given(st.sampled_from(sorted(OUTPUT_TYPES)), st.floats(-20, 20), st.integers(0, 2**31))
def test_every_output_type_says_what_it_was_given(output_type, level, seed):
    rng = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 2, 1, 3, 3, generator=rng, dtype=torch.float64)
    logsnr = torch.full((2,), level, dtype=torch.float64)
    z = diffuse(x, eps, logsnr)
    prediction = saying(x, output_type)(z, logsnr)
    alpha = torch.sigmoid(logsnr).sqrt().min()
    close(prediction.x, x, rtol=1e-9, atol=1e-14 / alpha.item())
    close(diffuse(*prediction, logsnr), z, rtol=1e-9, atol=1e-9)  # x_hat and eps_hat make up z


def test_a_ddim_step_to_infinity_is_x_hat_to_the_bit():
    x, eps = torch.randn(2, 3, 1, 4, 4)
    assert torch.equal(ddim_step(Prediction(x, eps), torch.full((3,), torch.inf)), x)


def test_a_ddim_step_nowhere_stays_where_it_is():
    z, logsnr = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([-3.0, 0.0, 7.0])
    prediction = STUDENTS["v"](z, logsnr.double())
    close(ddim_step(prediction, logsnr.double()), z)


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_the_posterior_at_infinity_is_x_without_noise(mix):
    z, x = torch.randn(2, 3, 1, 4, 4)
    infinite = torch.full((3,), torch.inf)
    mean, variance = posterior(z, x, torch.tensor([-20.0, 0.0, 9.0]), infinite, mix)
    torch.testing.assert_close(mean, x)
    assert (variance == 0).all()


def test_clipping_keeps_z_and_bounds_x():
    z, logsnr = 3 * torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.zeros(4).double()
    prediction = clipped(STUDENTS["x"])(z, logsnr)
    assert prediction.x.abs().max() == 1
    close(diffuse(*prediction, logsnr), z)


@given(st.sampled_from(sorted(OUTPUT_TYPES)), st.floats(-12, 12), st.integers(0, 2**31))
def test_a_denoiser_that_clips_predicts_what_clipping_afterwards_does(output_type, level, seed):
    rng = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(2, 1, 3, 3, generator=rng, dtype=torch.float64)
    logsnr = torch.full((2,), level, dtype=torch.float64)
    plain = STUDENTS[output_type]
    for found, expected in zip(
        replace(plain, clip=True)(z, logsnr), clipped(plain)(z, logsnr), strict=True
    ):
        close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_denoiser_that_clips_learns_from_outside_the_range_only_what_leads_back():
    output = torch.tensor([-3.0, -3.0, 0.5, 3.0, 3.0], dtype=torch.float64).requires_grad_()
    target = torch.tensor([-1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    denoise = Denoiser(lambda *_: output.expand(1, 1, 1, 5), "x", clip=True)
    z, logsnr = torch.zeros(1, 1, 1, 5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x = denoise(z, logsnr).x
    (x - target).square().sum().backward()
    assert output.grad.tolist() == [0.0, -2.0, 1.0, 0.0, 2.0]
    output.grad = None
    # towards values that cannot be reached the gradient leads further out, and is 0
    (denoise(z, logsnr).x - 9 * output.detach().sign()).square().sum().backward()
    assert output.grad.tolist() == [0.0, 0.0, -17.0, 0.0, 0.0]


@pytest.mark.parametrize("weigh", [constant, snr, snr_plus_one])
def test_the_best_prediction_of_a_denoiser_that_clips_is_the_mean(weigh):
    """Two pixels, one black in all images, one white in a tenth of them: -1 and -0.8."""
    x = torch.full((10, 1, 1, 2), -1.0, dtype=torch.float64)
    x[0, ..., 1] = 1.0
    logsnr = torch.zeros(10, dtype=torch.float64)
    eps = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = torch.tensor([0.7, 0.7], dtype=torch.float64).requires_grad_()
    denoise = Denoiser(lambda *_: output.expand(10, 1, 1, 2), "x", clip=True)
    optimizer = torch.optim.SGD([output], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        denoising_loss(denoise, x, eps, logsnr, weigh).mean().backward()
        optimizer.step()
    close(denoise(x, logsnr).x[0].flatten(), torch.tensor([-1.0, -0.8], dtype=torch.float64))
    with torch.no_grad():
        output[0] = -1.7  # beyond black nothing is left to learn
    output.grad = None
    denoising_loss(denoise, x, eps, logsnr, weigh).mean().backward()
    assert output.grad[0].abs() < 1e-12


def test_a_condition_reaches_the_network():
    seen = []

    def network(z, logsnr, label):
        seen.append(label)
        return z

    label = torch.tensor([1, 2])
    conditioned(Denoiser(network, "v"), label=label)(torch.zeros(2, 1, 2, 2), torch.zeros(2))
    assert seen[0] is label


def classful(calls):
    """A denoiser of v whose output depends on the class, -1 being none; it counts its calls."""

    def network(z, logsnr, label):
        calls.append(len(z))
        shift = 0.1 * label.to(z.dtype).reshape(-1, 1, 1, 1)
        return 0.5 * torch.tanh(z + shift)

    return Denoiser(network, "v")


@given(st.floats(0.0, 8.0), st.integers(0, 2**32 - 1))
def test_guidance_is_the_papers_formula(weight, seed):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64)
    logsnr = 20 * torch.rand(3, generator=rng, dtype=torch.float64) - 10
    label, none = torch.tensor([0, 3, 5]), torch.full((3,), -1)
    calls = []
    denoise = classful(calls)
    weights = torch.tensor([weight, weight / 2, 0.0], dtype=torch.float64)
    found = guided(denoise)(z, logsnr, label=label, guidance=weights)
    assert calls == [6], "one call, of twice the batch"
    known, free = denoise(z, logsnr, label=label), denoise(z, logsnr, label=none)
    w = weights.reshape(-1, 1, 1, 1)
    close(found.x, (1 + w) * known.x - w * free.x)
    assert torch.equal(found.x[2], known.x[2]), "a weight of 0 gives the class's own prediction"
    close(found.eps, eps_from_x(z, found.x, logsnr), rtol=1e-6, atol=1e-9)
    inside = guided(denoise, clip=True)(z, logsnr, label=label, guidance=weights)
    close(inside.x, found.x.clamp(-1.0, 1.0))
    close(inside.eps, eps_from_x(z, inside.x, logsnr), rtol=1e-6, atol=1e-9)
