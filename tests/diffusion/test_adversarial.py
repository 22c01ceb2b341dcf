import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from diffusion.adversarial import Adversary, further_level, noise_further, onward, walk_on
from diffusion.gaussian import Prediction, ddim_step, diffuse, eps_from_x
from diffusion.grids import uniform_grid
from diffusion.losses import Example
from diffusion.paths import neighbours, segments, to_the_data
from diffusion.samplers import ddim
from diffusion.schedule import alpha_sigma, make_schedule
from models.critic import Critic
from models.dit import DiT
from models.unet import UNet

INF = math.inf


@given(st.floats(-10, 10) | st.just(INF), st.floats(0.01, 0.9))
def test_a_further_level_lies_at_a_share_of_the_angle_that_is_left(level, share):
    """z = cos(angle) x + sin(angle) eps; the angle of nothing but noise is a right one."""
    start = torch.tensor([level], dtype=torch.float64)
    further = further_level(start, torch.tensor([share], dtype=torch.float64))
    angles = [
        torch.atan2(*alpha_sigma(at, torch.zeros(1).double())[::-1]) for at in (start, further)
    ]
    expected = angles[0] + share * (math.pi / 2 - angles[0])
    torch.testing.assert_close(angles[1], expected, rtol=1e-7, atol=1e-9)


@given(st.floats(-6, 8) | st.just(INF), st.floats(0.01, 0.9), st.integers(0, 2**31))
def test_noise_added_to_q_s_gives_q_m(level, share, seed):
    """Of one image and two noises: the mean is alpha_m x, the variance sigma_m^2."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, 2, 2, generator=rng, dtype=torch.float64)
    s = torch.tensor([level], dtype=torch.float64)
    m = further_level(s, torch.tensor([share], dtype=torch.float64))
    (alpha_s, sigma_s), (alpha_m, sigma_m) = (alpha_sigma(at, x) for at in (s, m))
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    torch.testing.assert_close(noise_further(alpha_s * x, zero, s, m), alpha_m * x)
    variance = noise_further(sigma_s * one, zero, s, m) ** 2 + noise_further(zero, one, s, m) ** 2
    torch.testing.assert_close(variance, sigma_m**2 * one)


def features(z, logsnr, label=None):
    """Of a toy: what a frozen network might see."""
    z = z if label is None else z + label.reshape(-1, 1, 1, 1) / 10
    return [z, torch.cat([z.square(), logsnr.reshape(-1, 1, 1, 1).to(z.dtype).expand_as(z)], dim=1)]


@pytest.fixture
def adversary():
    torch.manual_seed(0)
    critic = Critic([1, 2]).double()
    return Adversary(critic, critic, features, weight=0.5)


def student(z, logsnr):
    """Some denoiser."""
    x = 0.7 * torch.tanh(z + 0.1 * logsnr.reshape(-1, 1, 1, 1))
    return Prediction(x, eps_from_x(z, x, logsnr))


def test_a_student_goes_on_from_the_end_of_each_transition_to_the_data():
    """Its steps, and TRACT's jumps from within a step, lead to starts of others, up to +inf."""
    teacher = torch.tensor([-9.0, -4.0, -1.0, 1.0, 4.0, INF])
    own = teacher[[0, 2, 4, 5]]
    assert onward(neighbours(teacher, own)).T.tolist() == [
        [INF, INF, INF],
        [4.0, INF, INF],
        [-1.0, 4.0, INF],
    ]
    assert onward(segments(teacher, own)).T.tolist() == [
        [INF, INF, INF],
        [4.0, INF, INF],
        [4.0, INF, INF],
        [-1.0, 4.0, INF],
        [-1.0, 4.0, INF],
    ]
    assert onward(to_the_data(teacher, own)).T.tolist() == [[INF]] * 5


@given(st.integers(1, 4), st.integers(0, 2**31))
def test_walking_on_is_the_sampler_with_gradients(steps, seed):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 1, 2, 2, generator=rng, dtype=torch.float64).requires_grad_()
    levels = uniform_grid(make_schedule("cosine", -20.0, 20.0), 4)[4 - steps :]
    shorter = torch.full_like(levels, INF)  # of an image that is at its end already
    walked = walk_on(student, z, torch.stack([levels, levels, shorter], dim=1))
    torch.testing.assert_close(walked[:2], ddim(student, z.detach()[:2], levels))
    assert torch.equal(walked[2], z[2])
    walked.sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad[:2].any()


def test_the_students_term_and_the_critics_are_the_formulas(adversary):
    """The gradients of one loss are those of both, each in its own network alone."""
    rng = torch.Generator().manual_seed(2)
    x, z, x_hat = torch.randn(3, 6, 1, 8, 8, generator=rng, dtype=torch.float64)
    x_hat.requires_grad_()
    logsnr = torch.full((6,), -3.0, dtype=torch.float64)
    prediction = Prediction(x_hat, eps_from_x(z, x_hat, logsnr))
    ends = torch.tensor([[0.5, 0.5, 0.5, INF, INF, INF], [INF] * 6], dtype=torch.float64)
    example = Example(prediction, prediction, x, logsnr, ends[0])
    drawn = {name: value.double() for name, value in adversary.draw(rng, x.shape).items()}
    label = torch.arange(6)
    loss = adversary.loss(example, student, ends, {"label": label}, drawn)
    loss.mean().backward(retain_graph=True)

    level = further_level(ends[-1], 0.03 + 0.6 * drawn["share"])
    z_s = ddim_step(prediction, ends[0])
    sample = torch.cat([student(z_s[:3], ends[0, :3]).x, x_hat[3:]])
    fake = noise_further(sample, drawn["further"], ends[-1], level)
    real = diffuse(x, drawn["of_real"], level)

    def judge(z):
        return adversary.critic(features(z, level, label))

    wanted = 0.5 * F.softplus(-judge(fake)).mean(1)
    torch.testing.assert_close(loss, wanted)
    (of_student,) = torch.autograd.grad(wanted.mean(), x_hat)
    torch.testing.assert_close(x_hat.grad, of_student)
    assert of_student[:3].any()
    assert of_student[3:].any()

    fake = fake.detach()
    changes = judge(fake) - judge(fake + 0.05 * drawn["nudge"])
    changes_of_real = judge(real) - judge(real + 0.05 * drawn["nudge_real"])
    penalty = 0.01 * (changes.square() + changes_of_real.square()) / 0.05**2
    critics = (F.softplus(judge(fake)) + F.softplus(-judge(real)) + penalty).mean()
    parameters = list(adversary.critic.parameters())
    gradients = torch.autograd.grad(critics, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_critic_leads_a_generator_of_one_value_to_the_datas():
    """Images of one grey level; the student's is another, and the critic leads it there."""
    torch.manual_seed(0)
    critic, shift = Critic([1, 2]), nn.Parameter(torch.tensor(-0.5))
    adversary = Adversary(critic, critic, features, weight=1.0)
    optimizer = torch.optim.Adam([{"params": [shift], "lr": 0.03}, {"params": critic.parameters()}])
    rng = torch.Generator().manual_seed(0)
    end = torch.full((16,), INF)
    for _ in range(80):
        x = torch.full((16, 1, 8, 8), 0.5) + 0.05 * torch.randn(16, 1, 8, 8, generator=rng)
        x_hat = shift + 0.05 * torch.randn(16, 1, 8, 8, generator=rng)
        prediction = Prediction(x_hat, torch.zeros_like(x))
        example = Example(prediction, prediction, x, torch.full((16,), -20.0), end)
        optimizer.zero_grad()
        drawn = adversary.draw(rng, x.shape)
        adversary.loss(example, student, end[None], {}, drawn).mean().backward()
        optimizer.step()
        if shift > 0.4:
            return
    raise AssertionError(f"only {shift.item()}")


UNET = UNet(
    image_size=16,
    image_channels=1,
    output_channels=1,
    channels=8,
    embedding_channels=None,
    channel_multipliers=[1, 2],
    blocks_per_level=2,
    attention_resolutions=[],
    attention_heads=1,
    attention_head_dim=None,
    dropout=0.0,
    resample="conv",
    patch_size=1,
    num_classes=3,
)
DIT = DiT(
    image_size=16,
    image_channels=1,
    output_channels=1,
    channels=8,
    depth=3,
    attention_heads=1,
    mlp_ratio=2.0,
    patch_size=4,
    dropout=0.0,
    num_classes=3,
)


@pytest.mark.parametrize(
    ("network", "shapes"),
    [(UNET, [(8, 16, 16), (16, 8, 8), (16, 8, 8)]), (DIT, [(8, 4, 4), (8, 4, 4)])],
)
def test_feature_maps_are_those_of_the_way_to_the_middle(network, shapes):
    """One for each resolution and the middle, or for each block of the first half."""
    z, logsnr = torch.randn(2, 1, 16, 16), torch.tensor([-2.0, 3.0])
    label, seen = torch.tensor([0, -1]), []
    last = network.middle_out if network is UNET else network.blocks[1]
    hook = last.register_forward_hook(lambda _, __, output: seen.append(output))
    maps = network.feature_maps(z, logsnr, label=label)
    network(z, logsnr, label)
    hook.remove()
    assert [tuple(one.shape[1:]) for one in maps] == shapes
    flat = maps[-1].flatten(2) if network is UNET else maps[-1].flatten(2).transpose(1, 2)
    for passed in seen:
        torch.testing.assert_close(passed.reshape(flat.shape), flat)
    assert len(seen) == 2, "on the way to the output, too"
