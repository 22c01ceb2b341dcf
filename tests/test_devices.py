"""What must hold on any device; DEVICE=cuda runs these tests on a GPU. By default, the CPU."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import distill
import sample
import train
from diffusion.distillation import distillation_target
from diffusion.gaussian import Denoiser
from diffusion.grids import uniform_grid
from diffusion.paths import neighbours
from diffusion.samplers import SAMPLERS, make_sampler
from diffusion.schedule import level_dtype, levels_at, on_device
from pipeline.checkpoint import digest, load_checkpoint
from pipeline.config import make_config
from pipeline.engine import allow_tf32
from pipeline.network import build_network
from pipeline.sections import EngineConfig
from tests.toys import COSINE, tiny
from training.metrics import read_metrics
from utils.processes import choose_device
from utils.randomness import ImageNoise

DEVICE = choose_device(os.environ.get("DEVICE", "cpu"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """By default, convolutions on a GPU round float32 to TF32, 13 bits less."""
    allow_tf32(EngineConfig(tf32=False))
    yield
    allow_tf32(EngineConfig())


def run(script, *arguments):
    return script.main([*map(str, arguments), "--device", str(DEVICE)])


def short(**sections):
    """A config of one student, of 2 steps."""
    return tiny(
        **sections,
        distillation={"ladder": [4, 2]},
        sampling={"steps": 2, "grid": 1},
    )


def networks():
    """The same network, none of whose weights is zero, on the CPU and on the device."""
    config = make_config(tiny(), "tiny")
    network = build_network(config, CPU, dropout=0.0)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    copy = build_network(config, DEVICE, dropout=0.0)
    copy.load_state_dict(network.state_dict())
    return network, copy


def close(on_cpu, elsewhere, tolerance=2e-4):
    torch.testing.assert_close(elsewhere.cpu().float(), on_cpu.float(), rtol=0, atol=tolerance)


def test_a_network_and_its_gradients_are_those_of_the_cpu():
    z, logsnr = torch.randn(4, 1, 32, 32), torch.linspace(-20, 20, 4)
    pair = networks()
    outputs = [n(z.to(d), logsnr.to(d)) for n, d in zip(pair, (CPU, DEVICE), strict=True)]
    close(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for one, other in zip(*(n.parameters() for n in pair), strict=True):
        close(one.grad, other.grad)


def test_noise_levels_are_those_of_the_cpu():
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    at = on_device(t, DEVICE)  # not called levels here, but moved alike
    torch.testing.assert_close(
        levels_at(COSINE, at).cpu().double(), COSINE(t), rtol=1e-6, atol=1e-5
    )


def test_levels_without_float64_are_computed_on_the_cpu(monkeypatch):
    monkeypatch.setattr("diffusion.schedule.NO_FLOAT64", (DEVICE.type,))
    t = torch.linspace(0.9999, 1, 33, device=DEVICE)
    wanted = COSINE(t.cpu().double())
    levels = levels_at(COSINE, t)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.cpu().double(), wanted, rtol=1e-6, atol=1e-5)
    assert (COSINE(t.cpu()).double() - wanted).abs().max() > 1e-4, "why float32 is not enough"


@pytest.mark.parametrize("has", [True, False])
def test_some_of_intels_gpus_have_no_float64(has, monkeypatch):
    about = SimpleNamespace(has_fp64=has)
    monkeypatch.setattr("torch.xpu.get_device_properties", lambda device: about)
    assert level_dtype(torch.device("xpu")) == (torch.float64 if has else torch.float32)


def test_targets_are_those_of_the_cpu():
    paths = neighbours(uniform_grid(COSINE, 8), uniform_grid(COSINE, 4))
    z = torch.randn(4, 1, 32, 32)
    targets = [
        distillation_target([Denoiser(n, "v")] * 2, z.to(d), on_device(paths, d))
        for n, d in zip(networks(), (CPU, DEVICE), strict=True)
    ]
    close(*targets)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "{" not in name])
def test_samples_are_those_of_the_cpu_from_the_same_noise(sampler):
    drawn = []
    for network, device in zip(networks(), (CPU, DEVICE), strict=True):
        noise = ImageNoise(0, range(4), (1, 32, 32), device)
        levels = on_device(uniform_grid(COSINE, 4), device)
        with torch.no_grad():
            draw = make_sampler(sampler)
            drawn.append(draw(Denoiser(network, "v"), noise.draw(), levels, draw_noise=noise.draw))
    close(*drawn, tolerance=2e-3)


@pytest.mark.parametrize("precision", ["fp32"] if DEVICE.type == "cpu" else ["fp32", "bf16"])
def test_a_run_is_trained_distilled_continued_and_sampled(precision, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(short(engine={"precision": precision})))
    base, ladder = tmp_path / "base", tmp_path / "ladder"
    given = ("--config_path", config, "--output", base)
    assert run(train, *given, "--set", "training.updates=2") == 0
    assert run(train, *given) == 0, "the same run, continued"
    teacher = base / "diffusion-4.pt"
    assert run(distill, "--teacher_model_checkpoint", teacher, "--output", ladder) == 0
    student = load_checkpoint(ladder / "student-2.pt")
    assert all(tensor.isfinite().all() for tensor in student.weights.values())
    assert digest(student.weights) != digest(load_checkpoint(teacher).weights)
    file = tmp_path / "images.npz"
    assert run(sample, "--checkpoint", ladder / "student-2.pt", "--count", 5, "--output", file) == 0
    with np.load(file) as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 1)


def test_a_device_without_float64_trains_and_distils(tmp_path, monkeypatch):
    """As Apple's mps: the noise levels are float32 there, but computed in float64 on the CPU."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(short(model={"dropout": 0.0})))
    weights = []
    for name in ("double", "single"):
        if name == "single":
            monkeypatch.setattr("diffusion.schedule.NO_FLOAT64", (DEVICE.type,))
        base, ladder = tmp_path / name, tmp_path / f"{name}-ladder"
        assert run(train, "--config_path", config, "--output", base) == 0
        given = ("--teacher_model_checkpoint", base / "diffusion-4.pt", "--output", ladder)
        assert run(distill, *given, "--set", "distillation.grid=adaptive") == 0
        weights.append(load_checkpoint(ladder / "student-2.pt").weights)
    assert digest(weights[0]) != digest(weights[1]), "the setting has an effect"
    for key, value in weights[0].items():
        assert value.shape == weights[1][key].shape
        assert weights[1][key].isfinite().all()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are of NVIDIA's GPUs")
def test_recorded_updates_learn_what_others_do(tmp_path):
    """Graphs of updates in several parts, of different sizes, and of a critic's too."""
    config = tmp_path / "tiny.yaml"
    training = {"batch_size": 5, "accumulate": 2, "warmup": 1}
    config.write_text(yaml.safe_dump(short(model={"dropout": 0.0}, training=training)))
    curves = []
    for name in ("false", "true"):
        base, ladder = tmp_path / name, tmp_path / f"{name}-ladder"
        recorded = f"engine.cuda_graphs={name}"
        given = ("--config_path", config, "--output", base)
        assert run(train, *given, "--set", recorded) == 0
        given = ("--teacher_model_checkpoint", tmp_path / "false" / "diffusion-4.pt")
        loss = "distillation.losses={snr_trunc: 0.3, adversarial: 0.3}"
        assert run(distill, *given, "--output", ladder, "--set", recorded, loss) == 0
        lines = [
            line for folder in (base, ladder) for line in read_metrics(folder / "metrics.jsonl")
        ]
        curves.append([(line["loss"], line["gradient_norm"]) for line in lines if "loss" in line])
    assert len(curves[0]) == 4 + 3
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-3, atol=1e-5)
