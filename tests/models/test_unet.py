import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.layers import Attention, ResBlock, attend, group_norm, lecun_normal_, time_features
from models.unet import UNet
from pipeline.config import DiffusionConfig
from tests.toys import GOLDEN, golden
from tools.convert_jax import read_msgpack, state_dict_of

ROOT = Path(__file__).parents[2]
SMALL = {
    "image_size": 16,
    "image_channels": 1,
    "output_channels": 1,
    "channels": 8,
    "embedding_channels": None,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [8],
    "attention_heads": 2,
    "attention_head_dim": None,
    "dropout": 0.0,
    "resample": "block",
    "patch_size": 1,
    "num_classes": None,
}
TUTORIAL = {
    "image_size": 32,
    "image_channels": 1,
    "channels": 128,
    "channel_multipliers": [1, 2, 2, 2],
    "blocks_per_level": 2,
    "attention_resolutions": [16],
    "resample": "plain",
}
RESAMPLES = ["block", "conv", "plain"]


def awake(network):
    """The network with its zero-initialised weights drawn, so that every part of it speaks."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


# --- the original's parameters ------------------------------------------------------------------


def test_the_unet_is_the_reference():
    network = UNet(
        **SMALL
        | {
            "image_channels": 3,
            "output_channels": 3,
            "channels": 32,
            "embedding_channels": 128,
            "resample": "conv",
            "num_classes": 10,
        }
    ).double()
    path = GOLDEN / "checkpoint.msgpack"
    network.load_state_dict(state_dict_of(read_msgpack(path)["ema_params"], 2, path))
    reference = golden("unet_B_io.npz")
    x, logsnr, label = reference["x"], reference["logsnr"], reference["y"]
    output = network(x, logsnr, label)
    torch.testing.assert_close(output, reference["out"], rtol=0, atol=1e-10)
    single = network.float()(x.float(), logsnr.float(), label)
    torch.testing.assert_close(single.double(), reference["out"], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        # The tutorial's network, and the biases that its first and last convolution do not have.
        (TUTORIAL, 35_204_480 + 128 + 1),
        (TUTORIAL | {"resample": "block"}, 42_850_817),
        (  # CIFAR-10
            {
                "image_size": 32,
                "channels": 256,
                "channel_multipliers": [1, 1, 1],
                "attention_resolutions": [8, 16],
                "attention_heads": 1,
                "output_channels": 3,
            },
            60_004_099,
        ),
        (  # ImageNet-64
            {
                "image_size": 64,
                "channels": 192,
                "channel_multipliers": [1, 2, 3, 4],
                "attention_resolutions": [8, 16, 32],
                "attention_head_dim": 64,
                "num_classes": 1000,
                "output_channels": 6,
            },
            295_905_222,
        ),
        (  # LSUN 128
            {
                "image_size": 128,
                "channels": 64,
                "embedding_channels": 768,
                "channel_multipliers": [1, 2, 4, 6, 8],
                "attention_resolutions": [8, 16, 32],
                "attention_head_dim": 64,
                "output_channels": 6,
            },
            139_578_502,
        ),
    ],
)
def test_the_networks_of_the_papers_and_the_tutorial_have_their_sizes(sizes, count):
    with torch.device("meta"):
        network = UNet(**SMALL | {"image_channels": 3, "blocks_per_level": 3} | sizes)
    assert sum(p.numel() for p in network.parameters()) == count


# --- shapes and parts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 2, "attention_resolutions": [4]},
        {"resample": "conv"},
        {"resample": "plain"},
        {"resample": "plain", "channel_multipliers": [1, 2, 3], "attention_resolutions": [4]},
        {"image_channels": 3, "output_channels": 6},
        {"channel_multipliers": [1], "attention_resolutions": []},
        {"attention_head_dim": 4, "blocks_per_level": 2},
        {"channels": 9, "attention_heads": 3, "embedding_channels": 20},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_size_is_an_argument(changes, memory_format):
    sizes = SMALL | changes
    network = UNet(**sizes).to(memory_format=memory_format)
    z = torch.randn(2, sizes["image_channels"], 16, 16)
    output = network(z, torch.zeros(2))
    assert output.shape == (2, sizes["output_channels"], 16, 16)
    assert not output.any(), "the output convolution begins at zero"
    assert awake(network)(z, torch.zeros(2)).any()


@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_output_depends_on_everything(resample):
    network = awake(UNet(**SMALL | {"num_classes": 3, "resample": resample}))
    z, logsnr = torch.randn(2, 1, 16, 16), torch.tensor([-1.0, 1.0])
    output = network(z, logsnr, torch.tensor([0, 1]))
    assert not torch.allclose(output, network(z, logsnr + 1, torch.tensor([0, 1])))
    assert not torch.allclose(output[1], network(z, logsnr, torch.tensor([0, 2]))[1])
    for parameter in network.parameters():
        parameter.grad = None
    output.sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_a_missing_label_is_the_bias_alone():
    network = awake(UNet(**SMALL | {"num_classes": 3}))
    z, logsnr = torch.randn(2, 1, 16, 16), torch.zeros(2)
    missing = network(z, logsnr, torch.tensor([-1, -1]))
    assert torch.equal(missing, network(z, logsnr))
    with torch.no_grad():
        network.class_embedding.weight.zero_()
    torch.testing.assert_close(network(z, logsnr, torch.tensor([2, 0])), missing)


def test_a_label_for_a_network_without_classes_is_an_error():
    with pytest.raises(ValueError, match="without classes"):
        UNet(**SMALL)(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.tensor([0]))


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_residual_block_begins_as_its_skip(resample):
    block = ResBlock(8, 8, 16, 0.5, resample).eval()
    x = torch.randn(1, 8, 4, 4)
    expected = {
        None: x,
        "down": torch.nn.functional.avg_pool2d(x, 2),
        "up": x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[resample]
    torch.testing.assert_close(block(x, torch.randn(1, 16)), expected)


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_residual_block_resamples_before_its_first_convolution(resample):
    block = awake(ResBlock(8, 12, 16, 0.0, resample)).double()
    x, embedding = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    functional, silu = torch.nn.functional, torch.nn.functional.silu
    to = {
        None: lambda h: h,
        "down": lambda h: functional.avg_pool2d(h, 2),
        "up": lambda h: h.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[resample]
    h = block.conv1(to(silu(functional.group_norm(x, 8, *parameters_of(block.norm1)))))
    scale, shift = block.scale_shift(silu(embedding))[:, :, None, None].split(12, dim=1)
    h = functional.group_norm(h, 4, *parameters_of(block.norm2)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, embedding), block.skip(to(x)) + block.conv2(silu(h)))


def parameters_of(norm):
    return norm.weight, norm.bias, 1e-6


def test_plain_resampling_is_average_pooling_and_nearest_neighbour_without_weights():
    """Convolutions with such kernels do the same, at the same places of the network."""
    sizes = SMALL | {"channel_multipliers": [1, 2, 3]}
    plain = awake(UNet(**sizes | {"resample": "plain"})).double()
    conv = UNet(**sizes | {"resample": "conv"}).double()
    assert not [name for name in plain.state_dict() if "resample" in name]
    missing, unexpected = conv.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".resample.conv." in name for name in missing)
    assert len(missing) == 8, "a weight and a bias for each of two ways down and two up"
    mean, centre = torch.zeros(3, 3), torch.zeros(3, 3)
    mean[:2, :2], centre[1, 1] = 0.25, 1.0
    with torch.no_grad():
        for levels, kernel in ((conv.down, mean), (conv.up, centre)):
            for level in levels[:-1]:
                weight = level.resample.conv.weight
                weight.copy_(torch.eye(len(weight))[:, :, None, None] * kernel)
    z, logsnr = torch.randn(2, 1, 16, 16).double(), torch.tensor([-1.0, 2.0]).double()
    torch.testing.assert_close(plain(z, logsnr), conv(z, logsnr), rtol=1e-10, atol=1e-10)


def test_attention_is_softmax_of_scaled_products():
    attention = awake(Attention(8, heads=2)).double()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    tokens = attention.norm(x).flatten(2)[0].T
    q, k, v = attention.qkv(tokens).reshape(6, 3, 2, 4).permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.transpose(1, 2) / 2.0, dim=-1)  # sqrt of width 4
    out = attention.out((weights @ v).permute(1, 0, 2).reshape(6, 8))
    torch.testing.assert_close(attention(x), x + out.T.reshape(1, 8, 2, 3))


@pytest.mark.parametrize("tokens", [16, 300])
def test_attention_in_bf16_on_a_cpu_is_that_of_float32_but_for_rounding(tokens):
    """Few tokens are computed in bfloat16, many in float32 and rounded at the end."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, tokens, 8, dtype=torch.bfloat16) for _ in "qkv")
    towards = torch.randn(2, 2, tokens, 8)
    low = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*low)
    full = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    exact = attend(*full)
    for output in (found, exact):
        (output * towards).sum().backward()
    assert found.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    torch.testing.assert_close(found.float(), exact, rtol=0.0, atol=0.02)
    if tokens > 256:
        assert torch.equal(found, exact.bfloat16()), "rounded once"
    for one, other in zip(low, full, strict=True):
        error = (one.grad.float() - other.grad).norm() / other.grad.norm()
        assert error < 0.01, "a few times bfloat16's 2^-9"


def test_input_features_show_small_differences():
    """sin and cos of 2^n pi z beside z, as many times the channels (Kingma et al. 2021)."""
    network = awake(UNet(**SMALL | {"input_features": [7, 8]})).double()
    assert network.conv_in.in_channels == 5
    z, logsnr = torch.randn(1, 1, 16, 16).double(), torch.zeros(1).double()
    seen = []
    network.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    network(z, logsnr)
    angles = [2.0**n * torch.pi * z[0, 0] for n in (7, 8)]
    expected = [z[0, 0], *(a.sin() for a in angles), *(a.cos() for a in angles)]
    torch.testing.assert_close(seen[0], torch.stack(expected))
    folded = UNet(**SMALL | {"input_features": [7], "patch_size": 2, "attention_resolutions": [4]})
    assert folded.conv_in.in_channels == 12


def test_time_features():
    features = time_features(torch.tensor([-20.0, 0.0, 20.0, 50.0]).double(), 9)
    assert features.shape == (4, 9)
    assert not features[:, -1].any(), "an odd channel is a zero"
    torch.testing.assert_close(features[1, 0], torch.tensor(500.0).double().sin())
    torch.testing.assert_close(features[1, 3], torch.tensor(500.0 / 10000).double().sin())
    assert torch.equal(features[2], features[3]), "clipped to [-20, 20]"


def test_time_features_tell_every_noise_level_of_a_config_from_its_neighbours():
    """The limits of the config are those of the clip: wider ones would hold equal inputs."""
    low, high = (
        next(
            getattr(m, side) for m in DiffusionConfig.model_fields[key].metadata if hasattr(m, side)
        )
        for key, side in (("logsnr_min", "ge"), ("logsnr_max", "le"))
    )
    levels = torch.arange(low, high + 0.5, 0.5, dtype=torch.float64)
    features = time_features(levels, 64)
    assert (features.diff(dim=0).abs().amax(dim=1) > 1e-4).all()


def test_group_norm_has_the_largest_common_divisor_of_groups():
    assert [group_norm(c).num_groups for c in (32, 64, 48, 24, 9)] == [32, 32, 16, 8, 1]
    assert group_norm(64).eps == 1e-6


def test_lecun_normal_has_variance_one_over_fan_in():
    weight = torch.empty(512, 64, 3, 3)
    lecun_normal_(weight)
    expected = (1 / (64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.01)
    assert weight.abs().max().item() <= 2 * expected / 0.8796 * 1.001


@pytest.mark.parametrize("resample", RESAMPLES)
def test_bf16_autocast_is_close_to_float32(resample):
    network = awake(UNet(**SMALL | {"resample": resample}))
    z, logsnr = torch.randn(2, 1, 16, 16), torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(z, logsnr)
    full = network(z, logsnr)
    assert low.dtype == torch.bfloat16
    assert (low - full).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_compiled_network_is_the_eager_one(resample):
    network = awake(UNet(**SMALL | {"resample": resample}))
    z, logsnr = torch.randn(2, 1, 16, 16), torch.tensor([-1.0, 2.0])
    compiled = torch.compile(network)
    torch.testing.assert_close(compiled(z, logsnr), network(z, logsnr), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_tutorials_network_learns_in_a_full_sized_update():
    network = UNet(**SMALL | TUTORIAL)
    z, logsnr = torch.randn(4, 1, 32, 32), torch.zeros(4)
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    losses = []
    for _ in range(3):
        loss = (network(z, logsnr) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


COUNT_GRAPHS = """
import torch
from torch._dynamo.testing import CompileCounter
from models.unet import UNet
graphs, counts = CompileCounter(), []
z, logsnr = torch.randn(2, 1, 16, 16), torch.zeros(2)
for _ in range(10):
    student, teacher = UNet(**SIZES), UNet(**SIZES).requires_grad_(False).eval()
    with torch.no_grad():
        torch.compile(teacher, backend=graphs)(z, logsnr)
    torch.compile(student, backend=graphs)(z, logsnr).sum().backward()
    counts.append(graphs.frame_count)
print(counts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_stages_of_a_ladder_share_their_compiled_graphs(resample):
    """Torch compiles a function eight times at most, and then no more: a ladder has ten stages.

    In a process of its own, as the checks of conftest.py break the graphs.
    """
    code = COUNT_GRAPHS.replace("SIZES", repr(SMALL | {"resample": resample}))
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == str([2] * 10)
