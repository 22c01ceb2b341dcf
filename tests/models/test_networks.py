"""The contract of a network, for every entry of NETWORKS, and the transformer's own tests."""

import math

import pytest
import torch
from pydantic import ValidationError

from models.dit import DiT, DiTSection, positions
from models.networks import NETWORKS
from pipeline.config import make_config
from pipeline.network import build_network
from tests.models.test_unet import awake
from utils.command import InputError

TINY = {
    "unet": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [8],
    },
    "dit": {"channels": 16, "depth": 2, "attention_heads": 2, "patch_size": 4},
}
# A foreign network has none of these habits: see tests/tools/test_import_diffusers.py.
NAMES = sorted(NETWORKS.keys() - {"diffusers_unet"})


def config_of(name, prediction="v", **changes):
    model = {"name": name, "dropout": 0.0, **TINY[name], **changes}
    values = {"data": {"image_size": 16}, "model": model}
    return make_config(values | {"diffusion": {"prediction": prediction}}, "x.yaml")


def network_of(name, **changes):
    torch.manual_seed(0)
    return build_network(config_of(name, **changes), torch.device("cpu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prediction", "channels"), [("v", 1), ("both", 2)])
def test_an_output_has_the_shape_of_the_image(name, prediction, channels):
    network = network_of(name, prediction=prediction)
    z = torch.randn(3, 1, 16, 16)
    output = network(z, torch.zeros(3))
    assert output.shape == (3, channels, 16, 16)
    assert not output.any(), "the last layer begins at zero"
    assert awake(network)(z, torch.zeros(3)).any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_and_everything_is_heard(name):
    network = awake(network_of(name, num_classes=3, guidance=True)).double()
    z = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    logsnr = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    label, guidance = torch.tensor([0, 1]), torch.tensor([0.5, 2.0], dtype=torch.float64)
    output = network(z, logsnr, label, guidance)
    for n in range(2):
        alone = network(z[n : n + 1], logsnr[n : n + 1], label[n : n + 1], guidance[n : n + 1])
        torch.testing.assert_close(output[n : n + 1], alone)
    for changed in (
        (z + 0.1, logsnr, label, guidance),
        (z, logsnr + 0.1, label, guidance),
        (z, logsnr, 2 - label, guidance),
        (z, logsnr, label, guidance + 0.1),
    ):
        assert not torch.allclose(output, network(*changed))
    output.sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("name", NAMES)
def test_guidance_starts_as_the_network_without_it(name):
    plain, guided = network_of(name, num_classes=3), network_of(name, num_classes=3, guidance=True)
    awake(plain)
    missing, extra = guided.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert {key.split(".")[0] for key in missing} == {"guidance_embedding"}
    z, logsnr, label = torch.randn(2, 1, 16, 16), torch.zeros(2), torch.tensor([2, -1])
    assert torch.equal(plain(z, logsnr, label), guided(z, logsnr, label, torch.tensor([0.0, 3.0])))


@pytest.mark.parametrize("name", NAMES)
def test_no_label_is_label_minus_one_and_what_is_not_taken_is_an_error(name):
    network = awake(network_of(name, num_classes=3))
    z, logsnr = torch.randn(2, 1, 16, 16), torch.zeros(2)
    assert torch.equal(network(z, logsnr), network(z, logsnr, torch.tensor([-1, -1])))
    with pytest.raises(ValueError, match="takes no guidance"):
        network(z, logsnr, None, torch.zeros(2))
    with pytest.raises(ValueError, match="needs a guidance"):
        network_of(name, guidance=True)(z, logsnr)
    with pytest.raises(ValueError, match="without classes"):
        network_of(name)(z, logsnr, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_the_sections(name):
    def rates(dropout):
        network = build_network(config_of(name, dropout=0.5), torch.device("cpu"), dropout)
        return {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}

    assert (rates(None), rates(0.0)) == ({0.5}, {0.0})


@pytest.mark.parametrize("name", NAMES)
def test_every_section_has_what_the_project_asks_of_it(name):
    section = NETWORKS[name].section
    assert {"name", "dropout", "num_classes", "guidance"} <= section.model_fields.keys()
    assert section(name=name).misfit(32, "model") is None
    with pytest.raises(ValidationError):
        section(name="another")


# --- the transformer ----------------------------------------------------------------------------


def test_dit_s_2_has_the_papers_size():
    """33 M parameters at 4 x 32 x 32 with 1,000 classes and a learned variance (table 1).

    The paper's code also counts its fixed positions, 256 x 384, and has an embedding for no class
    where this one has a bias.
    """
    sizes = DiTSection(name="dit", num_classes=1000).model_dump(exclude={"name"})
    with torch.device("meta"):
        network = DiT(image_size=32, image_channels=4, output_channels=8, **sizes)
    count = sum(p.numel() for p in network.parameters())
    assert count == 32_865_056
    assert round((count + 256 * 384) / 1e6) == 33


def test_a_new_block_changes_nothing():
    network = network_of("dit")
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 16)), tokens)


def test_a_block_is_the_papers():
    """x + gate1 attention(norm(x) (1 + scale1) + shift1), then the same with the perceptron."""
    block = awake(network_of("dit").blocks[0]).double()
    x, embedding = torch.randn(2, 5, 16).double(), torch.randn(2, 16).double()
    functional = torch.nn.functional
    parts = block.modulation(functional.silu(embedding))[:, None].split(16, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts

    def norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    q, k, v = block.qkv(norm(x) * (1 + scale1) + shift1).split(16, dim=-1)
    heads = []
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        weights = (q[..., own] @ k[..., own].mT / math.sqrt(8)).softmax(-1)
        heads.append(weights @ v[..., own])
    h = x + gate1 * block.out(torch.cat(heads, -1))
    hidden = functional.gelu(block.mlp_in(norm(h) * (1 + scale2) + shift2), approximate="tanh")
    torch.testing.assert_close(block(x, embedding), h + gate2 * block.mlp_out(hidden))


def test_positions_differ_and_are_those_of_rows_and_columns():
    embedded = positions(4, 16)
    assert torch.cdist(embedded, embedded).fill_diagonal_(1).min() > 0.1
    by_place = embedded.reshape(4, 4, 2, 8)
    assert (by_place[:, :, 0] == by_place[:1, :, 0]).all(), "one half tells the column"
    assert (by_place[:, :, 1] == by_place[:, :1, 1]).all(), "the other one the row"
    torch.testing.assert_close(embedded[1, 0], torch.tensor(1.0).sin())


def test_a_patch_goes_back_to_its_place():
    """With its last layer set to read a patch's own values, the network returns them in place."""
    network = network_of("dit", channels=16, patch_size=4).double()
    with torch.no_grad():
        network.patch_in.weight.copy_(torch.eye(16))
        network.positions.zero_()
        network.patch_out.weight.copy_(torch.eye(16))
    z = torch.randn(1, 1, 16, 16).double()
    patches = z.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 16)
    expected = torch.nn.functional.layer_norm(patches, (16,), eps=1e-6)
    expected = expected.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(1, 1, 16, 16)
    torch.testing.assert_close(network(z, torch.zeros(1).double()), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "data.image_size: 16 is not divisible by the 3 of model.patch_size"),
        ({"channels": 10, "attention_heads": 1}, "model.channels: 10 is not divisible by 4"),
        ({"attention_heads": 3}, "model.attention_heads: 3 does not divide"),
        ({"name": "vit"}, "model.name: 'vit' is not one of unet, dit"),
        ({"name": None}, "model.name: 'None' is not one of unet, dit"),
        ({"name": ["dit"]}, "model.name: .* is not one of unet, dit"),
        ({"dept": 3}, "model.dept: unknown key; did you mean depth"),
        ({"depth": 0}, "model.depth: input should be greater than or equal to 1"),
        ({"resample": "conv"}, "model.resample: unknown key"),
    ],
)
def test_a_wrong_section_is_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        make_config(
            {"data": {"image_size": 16}, "model": {"name": "dit", **TINY["dit"], **changes}}, "x"
        )
    assert "\n" not in str(error.value)


def test_a_students_section_may_name_another_network():
    student = {"name": "dit", "patch_size": 5}
    with pytest.raises(InputError, match=r"5 of distillation.student.patch_size"):
        make_config({"distillation": {"student": student}}, "x")
    with pytest.raises(InputError, match=r"distillation.student.deph: .* did you mean depth"):
        make_config({"distillation": {"student": {"name": "dit", "deph": 5}}}, "x")
    with pytest.raises(InputError, match=r"model: not a section of keys and values \(it is 3\)"):
        make_config({"model": 3}, "x")
