from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion.adversarial import Adversary, onward
from diffusion.distillation import METHODS, distillation_loss, distillation_target, target_weights
from diffusion.gaussian import (
    OUTPUT_TYPES,
    Denoiser,
    Prediction,
    clipped,
    ddim_step,
    eps_from_x,
    velocity,
)
from diffusion.grids import uniform_grid
from diffusion.losses import LOSSES, SQUARED_ERRORS, mean_square
from diffusion.objectives import distillation_objective
from diffusion.paths import neighbours
from diffusion.samplers import ddim
from tests.toys import COSINE, STUDENTS, TEACHERS, golden, saying


def transition_levels(num_steps, i, k):
    """The levels (k + 1, B) of the student's steps i of num_steps, 0 being the last one."""
    return neighbours(uniform_grid(COSINE, k * num_steps), uniform_grid(COSINE, num_steps))[:, i]


@pytest.mark.parametrize("num_steps", [2, 512])
@pytest.mark.parametrize("output_type", ["v", "x"])
def test_target_and_losses_are_the_reference(num_steps, output_type):
    reference = golden("distill_loss.npz")
    at = {
        key.rsplit(f"n{num_steps}/", 1)[1]: value
        for key, value in reference.items()
        if f"n{num_steps}/" in key
    }

    def expect(actual, name, rows=slice(None)):
        expected = at[name] if name in at else at[f"{output_type}/{name}"]
        torch.testing.assert_close(actual[rows], expected[rows], rtol=1e-9, atol=1e-11)

    teacher, student = TEACHERS[output_type], STUDENTS[output_type]
    levels = transition_levels(num_steps, at["i"], 2)
    inner = at["i"] > 0  # at i = 0 the reference's last level is 20, ours +inf
    expect(levels[0], "logsnr")
    expect(levels[1], "logsnr_mid")
    expect(levels[2], "logsnr_s", inner)
    assert (levels[2][~inner] == torch.inf).all()

    first = teacher(at["z_t"], levels[0])
    expect(first.x, "x_pred_start")
    z_mid = ddim_step(first, levels[1])
    expect(z_mid, "z_mid")
    second = teacher(z_mid, levels[1])
    expect(second.x, "x_pred_mid")
    expect(ddim_step(second, levels[2]), "z_teacher", inner)

    x_target = distillation_target([teacher] * (len(levels) - 1), at["z_t"], levels)
    expect(x_target, "x_target")
    target = Prediction(x_target, eps_from_x(at["z_t"], x_target, levels[0]))
    expect(target.eps, "eps_target")
    expect(velocity(target, levels[0]), "v_target")
    prediction = student(at["z_t"], levels[0])
    expect(mean_square(prediction.x - target.x), "x_mse")
    expect(mean_square(prediction.eps - target.eps), "eps_mse")
    x, eps = reference["x"], reference["eps"]
    names = {"snr_plus_one": "loss_v_mse"}
    for name in ("constant", "snr", "snr_trunc", "snr_plus_one"):
        loss = SQUARED_ERRORS[name]
        value = distillation_loss(student, [teacher] * 2, x, eps, levels, loss)
        expect(value, names.get(name, f"loss_{name}"))


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 32])
def test_one_student_step_lands_on_the_teachers_k_at_every_grid_point(num_steps, output_type, k):
    teacher = STUDENTS["v"]
    grid = uniform_grid(COSINE, k * num_steps)
    for i in range(num_steps):
        z = torch.randn(2, 1, 3, 3, dtype=torch.float64)
        steps = grid[k * (num_steps - 1 - i) :][: k + 1]
        z_s = ddim(teacher, z, steps)  # the sampler's own steps
        levels = transition_levels(num_steps, torch.full((2,), i), k)
        x_target = distillation_target([teacher] * (len(levels) - 1), z, levels)
        student = saying(x_target, output_type)
        landed = ddim_step(student(z, levels[0]), levels[-1])
        torch.testing.assert_close(landed, z_s, rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 4096),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(sorted(OUTPUT_TYPES)),
    st.integers(0, 2**31),
    st.data(),
)
def test_one_student_step_lands_on_the_teachers_k(num_steps, k, output_type, seed, data):
    i = data.draw(st.sampled_from([0, num_steps - 1]) | st.integers(0, num_steps - 1))
    z = torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    levels = transition_levels(num_steps, torch.tensor([i]), k)
    z_s = ddim(STUDENTS["v"], z, levels[:, 0])
    x_target = distillation_target([STUDENTS["v"]] * (len(levels) - 1), z, levels)
    landed = ddim_step(saying(x_target, output_type)(z, levels[0]), levels[-1])
    torch.testing.assert_close(landed, z_s, rtol=1e-8, atol=1e-8)


@given(st.integers(2, 4096), st.integers(0, 2**31), st.data())
def test_the_convex_form_is_the_papers(num_steps, seed, data):
    i = data.draw(st.integers(1, num_steps - 1))
    z = torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    levels = transition_levels(num_steps, torch.tensor([i]), 2)
    z_s = ddim(TEACHERS["v"], z, levels[:, 0])
    alpha, sigma = torch.sigmoid(levels).sqrt(), torch.sigmoid(-levels).sqrt()
    rho = sigma[2] / sigma[0]
    subtractive = (z_s - rho * z) / (alpha[2] - rho * alpha[0])
    x_target = distillation_target([TEACHERS["v"]] * (len(levels) - 1), z, levels)
    # the paper's form loses digits where the two levels are close
    torch.testing.assert_close(x_target, subtractive, rtol=1e-8, atol=1e-8)


@given(st.integers(1, 4096), st.integers(2, 8), st.data())
def test_the_weights_are_convex(num_steps, k, data):
    i = data.draw(st.integers(0, num_steps - 1))
    weights = target_weights(transition_levels(num_steps, torch.tensor([i]), k))[:, 0]
    assert weights.shape == (k,)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    if i == 0:
        assert weights.tolist() == [0.0] * (k - 1) + [1.0]


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("num_steps", [1, 4, 4096])
def test_at_the_last_step_the_target_is_the_teachers_last_x_hat(num_steps, k):
    z = torch.randn(3, 1, 4, 4)
    seen = []

    def teacher(z, logsnr):
        seen.append(STUDENTS["v"](z, logsnr).x)
        return STUDENTS["v"](z, logsnr)

    levels = transition_levels(num_steps, torch.zeros(3, dtype=torch.long), k)
    assert torch.equal(distillation_target([teacher] * (len(levels) - 1), z, levels), seen[-1])
    assert len(seen) == k


def test_float32_loses_little_even_at_4096_steps():
    i = torch.randint(1, 4096, (256,))
    levels = transition_levels(4096, i, 2)
    z = torch.randn(256, 1, 4, 4, dtype=torch.float64)
    exact = distillation_target([TEACHERS["v"]] * (len(levels) - 1), z, levels)
    single = distillation_target([TEACHERS["v"]] * (len(levels) - 1), z.float(), levels)
    assert (single - exact).square().mean().sqrt() < 5e-6


def test_no_gradient_reaches_the_teacher():
    networks = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)]
    student, teacher = (
        Denoiser(lambda z, logsnr, network=network: network(z), "v") for network in networks
    )
    x, eps = torch.randn(2, 4, 1, 8, 8)
    levels = transition_levels(4, torch.arange(4), 2)
    loss = distillation_loss(student, [teacher] * 2, x, eps, levels, LOSSES["snr_trunc"])
    loss.mean().backward()
    assert all(p.grad is not None for p in networks[0].parameters())
    assert all(p.grad is None for p in networks[1].parameters())


def test_the_target_is_not_clipped():
    z, levels = 5 * torch.randn(4, 1, 4, 4), transition_levels(4, torch.arange(4), 2)
    loud = Denoiser(lambda z, logsnr: 3 * torch.ones_like(z), "x")
    torch.testing.assert_close(
        distillation_target([loud] * (len(levels) - 1), z, levels), torch.full_like(z, 3.0)
    )
    assert (distillation_target([clipped(loud)] * (len(levels) - 1), z, levels) <= 1).all()
    # but if the model itself is in range, so are its targets
    ranged = replace(loud, clip=True)
    target = distillation_target([ranged] * (len(levels) - 1), z, levels)
    torch.testing.assert_close(target, torch.ones_like(z))


# --- any walkers, any levels ----------------------------------------------------------------------

WALKERS = [STUDENTS["v"], TEACHERS["v"], TEACHERS["x"], STUDENTS["both"]]


@st.composite
def walks(draw):
    """Legs of mixed walkers, and rising logsnrs for three images."""
    count = draw(st.integers(1, 6))
    gaps = st.floats(0.05, 6.0)
    columns = []
    for _ in range(3):
        steps = [draw(gaps) for _ in range(count)]
        columns.append(torch.tensor([-8.0, *steps], dtype=torch.float64).cumsum(0))
    legs = [draw(st.sampled_from(WALKERS)) for _ in range(count)]
    return legs, torch.stack(columns, dim=1)


def walk(legs, z, levels):
    for denoise, here, there in zip(legs, levels, levels[1:], strict=False):
        z = ddim_step(denoise(z, here), there)
    return z


@given(walks(), st.integers(0, 2**31))
def test_the_convex_form_is_the_papers_whoever_walks(legs_and_levels, seed):
    legs, levels = legs_and_levels
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alpha, sigma = torch.sigmoid(levels).sqrt(), torch.sigmoid(-levels).sqrt()
    rho = (sigma[-1] / sigma[0]).reshape(-1, 1, 1, 1)
    alpha_t, alpha_s = (a.reshape(-1, 1, 1, 1) for a in (alpha[0], alpha[-1]))
    subtractive = (walk(legs, z, levels) - rho * z) / (alpha_s - rho * alpha_t)
    torch.testing.assert_close(
        distillation_target(legs, z, levels), subtractive, rtol=1e-9, atol=1e-9
    )


@given(walks(), st.integers(0, 2**31))
def test_a_repeated_level_changes_nothing(legs_and_levels, seed):
    """Padding anywhere, also behind a last level of +inf, leaves target and weights alone."""
    legs, levels = legs_and_levels
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def unused(z, logsnr):
        return Prediction(torch.full_like(z, 1e6), torch.full_like(z, torch.nan))

    for last in (levels[-1:], torch.full_like(levels[-1:], torch.inf)):
        known = torch.cat([levels[:-1], last])
        expected = distillation_target(legs, z, known)
        for at in range(len(known)):
            padded = torch.cat([known[: at + 1], known[at:]])
            weights = target_weights(padded)
            assert (weights[at] == 0).all()
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))
            found = distillation_target([*legs[:at], unused, *legs[at:]], z, padded)
            assert torch.equal(found, expected)


def test_one_leg_is_matched_as_it_is():
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    for end in (2.0, torch.inf):
        levels = torch.tensor([[-3.0] * 3, [end] * 3], dtype=torch.float64)
        target = distillation_target([TEACHERS["v"]], z, levels)
        assert torch.equal(target, TEACHERS["v"](z, levels[0]).x)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_who_walks_each_leg(name):
    method = METHODS[name]
    teacher, average = TEACHERS["v"], STUDENTS["v"]
    rest = teacher if name == "progressive" else average
    assert method.legs(3, teacher, average) == [teacher, rest, rest]
    if method.needs_average:
        with pytest.raises(ValueError, match="average"):
            method.legs(2, teacher, None)


def test_a_consistency_target_is_the_averages_x_hat_one_step_down():
    grid, z = uniform_grid(COSINE, 8), torch.randn(8, 1, 2, 2, dtype=torch.float64)
    teacher, average = TEACHERS["v"], STUDENTS["v"]
    levels = METHODS["consistency"].paths(grid, grid[[0, -1]])
    target = distillation_target([teacher, average], z, levels)
    stepped = ddim_step(teacher(z, levels[0]), levels[1])
    torch.testing.assert_close(target[1:], average(stepped, levels[1]).x[1:])
    # from the last level above the data the teacher's own step ends there
    torch.testing.assert_close(target[0], teacher(z, levels[0]).x[0])


def test_an_adversary_goes_on_from_the_end_of_each_transition():
    seen = []

    class Stub(Adversary):
        def __init__(self):
            pass

        def draw(self, rng, shape):
            return {"share": torch.rand(shape[0], generator=rng)}

        def loss(self, example, denoise, levels, condition, drawn):
            seen.append((example, levels, condition, drawn))
            return torch.full((len(example.x),), 100.0)

    def network(z, logsnr, label, guidance):
        return z

    student = Denoiser(network, "v")
    paths = neighbours(uniform_grid(COSINE, 8), uniform_grid(COSINE, 4))
    given = (student, [student] * 2, paths, LOSSES["snr_trunc"])
    objectives = [
        distillation_objective(*given, guidance=(1.0, 3.0), adversary=adversary)
        for adversary in (None, Stub())
    ]
    drawn = objectives[1].draw(torch.Generator().manual_seed(0), torch.Size([16, 1, 4, 4]))
    x, label = torch.randn(16, 1, 4, 4), torch.arange(16) % 10
    (without, _), (losses, _) = (o.loss(x, {"label": label}, drawn) for o in objectives)
    torch.testing.assert_close(losses, without + 100.0)
    ((example, levels, condition, its),) = seen
    assert torch.equal(levels, onward(paths)[:, drawn["i"]])
    assert torch.equal(example.x, x)
    assert condition.keys() == {"label"}, "the critic's network takes no guidance weight"
    assert its is drawn


def test_guidance_reaches_the_student_and_the_teacher_alike():
    grid = uniform_grid(COSINE, 4)
    seen = {"student": [], "teacher": []}

    def denoise(name):
        def network(z, logsnr, label, guidance):
            seen[name].append((label, guidance))
            return z

        return Denoiser(network, "v")

    paths = neighbours(grid, uniform_grid(COSINE, 2))
    objective = distillation_objective(
        denoise("student"),
        [denoise("teacher")] * 2,
        paths,
        LOSSES["snr_trunc"],
        guidance=(1.0, 3.0),
    )
    drawn = objective.draw(torch.Generator().manual_seed(0), torch.Size([64, 1, 4, 4]))
    assert 1 <= drawn["guidance"].min() < 1.2 < 2.8 < drawn["guidance"].max() <= 3
    label = torch.arange(64) % 10
    losses, logsnr = objective.loss(torch.randn(64, 1, 4, 4), {"label": label}, drawn)
    assert losses.shape == logsnr.shape == (64,)
    assert len(seen["student"]) == 1
    assert len(seen["teacher"]) == 2
    for labels, weights in seen["student"] + seen["teacher"]:
        assert torch.equal(labels, label)
        assert torch.equal(weights, drawn["guidance"])
