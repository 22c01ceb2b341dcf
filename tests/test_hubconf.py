"""torch.hub: the README's lines from another folder, the same images, nothing else changed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import hub

from pipeline.api import load_published, load_sampler
from pipeline.build import build_network, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import make_config
from pipeline.sampling import SampleRequest
from tests.toys import tiny
from utils.command import InputError
from utils.processes import World

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EIGHT = ROOT / "pretrained" / "mnist-8-steps.safetensors"
TEACHER = ROOT / "pretrained" / "mnist-teacher.safetensors"
TWO = ROOT / "pretrained" / "mnist-adversarial-2-steps.safetensors"


def expected(path, count, seed=0, **settings):
    """The images of sample.py."""
    checkpoint = load_checkpoint(path)
    denoiser = load_denoiser(checkpoint, path, CPU)
    return SampleRequest.of(checkpoint, denoiser, World(CPU), seed=seed, **settings).draw_all(count)


def elsewhere(code, folder):
    """What Python prints for the code in a folder that links to this repository."""
    (folder / "progressive-distillation").symlink_to(ROOT)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_the_three_lines_of_the_readme_run_in_another_folder(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Three lines\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 3
    code += "torch.save(images, 'images.pt')\nimport sys\nprint(*sorted(sys.modules))"
    out, error = elsewhere(code, tmp_path)
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(images, expected(TWO, 64))
    assert error == ""
    slow = {"matplotlib", "torchvision", "tensorboard", "diffusers", "msgpack", "torch_fidelity"}
    assert slow & set(out.split()) == set()
    # The link to this repository is the test's own.
    assert {path.name for path in tmp_path.iterdir()} == {"images.pt", "progressive-distillation"}


STATE = """
def state():
    return (
        os.getcwd(), sys.path[:], sorted(os.environ.items()), random.getstate(),
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.is_grad_enabled(), torch.get_default_dtype(), signal.getsignal(signal.SIGINT),
        warnings.filters[:],
    )
"""


def test_loading_and_sampling_change_no_setting_of_the_program(tmp_path):
    code = f"""
import os, random, signal, sys, warnings
import numpy as np, torch, torch._dynamo
{STATE}
import einops, pydantic, safetensors, tqdm  # what these do is their own
torch.set_float32_matmul_precision("medium")
before = state()
sample = torch.hub.load("progressive-distillation", "mnist", steps=1, source="local")
os.chdir("/")
images = sample(2, seed=5)
os.chdir(before[0])
for a, b in zip(before, state(), strict=True):
    assert a == b, (a, b)
print(images.float().mean().item() > 0)
"""
    assert elsewhere(code, tmp_path) == ("True\n", "")


@pytest.mark.parametrize("file", ["utils/__init__.py", "utils/another.py", "utils.py"])
def test_a_package_of_the_same_name_is_named(tmp_path, file):
    (tmp_path / "utils").mkdir()
    (tmp_path / file).write_text("")
    code = """
import torch, utils
try:
    torch.hub.load("progressive-distillation", "mnist", source="local")
except ImportError as error:
    print(error)
"""
    out, _ = elsewhere(code, tmp_path)
    assert out.startswith(f"utils is already imported from {tmp_path / 'utils'}")
    assert out.count("\n") == 1


def test_only_the_entry_points_are_public_and_the_dependencies_are_whole():
    module = hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    public = {n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")}
    assert public == {"mnist", "load"}
    assert all(importlib.util.find_spec(name) for name in module.dependencies)
    code = """
import sys, torch
before = {*sys.modules}
import pipeline.api
for name in {*sys.modules} - before:
    if "site-packages" in (getattr(sys.modules[name], "__file__", None) or ""):
        print(name.split(".")[0])
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # pydantic's own parts come with it, and torch imports more of itself.
    own = {"annotated_types", "pydantic_core", "typing_extensions", "typing_inspection"}
    third_party = {name for name in out.split() if not name.startswith("_")} - own
    print(sorted(third_party))
    assert {"einops", "pydantic"} < third_party <= {*module.dependencies}


def test_the_steps_choose_the_file():
    sampler = load_published(ROOT / "pretrained", "mnist", 4, "cpu")
    assert (sampler.checkpoint.num_steps, sampler.steps) == (4, None)
    for steps in (None, 65):
        sampler = load_published(ROOT / "pretrained", "mnist", steps, "cpu")
        assert (sampler.checkpoint.kind, sampler.steps) == ("base", steps)
    for steps in (3, 0, -1):
        with pytest.raises(InputError, match=rf"steps: {steps}; .* 1, 2, 4, 8 steps"):
            load_published(ROOT / "pretrained", "mnist", steps)


def test_the_kind_chooses_the_students_and_their_teacher():
    folder = ROOT / "pretrained"
    sampler = load_published(folder, "mnist", 8, "cpu", kind="half-width")
    assert torch.equal(sampler(2), expected(folder / "mnist-half-width-8-steps.safetensors", 2))
    assert load_published(folder, "mnist", kind="half-width").checkpoint.config.model.channels == 32
    teacher = load_published(folder, "mnist", kind="by-class")
    assert teacher.checkpoint.config.model.num_classes == 10
    with pytest.raises(InputError, match="steps: 4; mnist has students of 1, 8 steps"):
        load_published(folder, "mnist", 4, kind="half-width")
    kinds = "'', 'adversarial', 'by-class', 'half-width', 'tract'"
    with pytest.raises(InputError, match=f"kind: 'best'; mnist has {kinds}"):
        load_published(folder, "mnist", 4, kind="best")
    with pytest.raises(InputError, match="configs: has no weights named mnist-<steps>-steps"):
        load_published(ROOT / "configs", "mnist")


def test_the_images_are_those_of_sample_py_one_by_one():
    sampler = load_sampler(str(EIGHT), device="cpu")
    assert torch.equal(sampler(5, seed=3, batch_size=2), expected(EIGHT, 5, seed=3, batch_size=2))
    assert not torch.equal(sampler(2, seed=3), sampler(2, seed=4))
    teacher = load_sampler(TEACHER, steps=3, device="cpu")
    assert torch.equal(teacher(2), expected(TEACHER, 2, steps=3))


@pytest.fixture
def conditional(tmp_path):
    """A base model by class with random weights."""
    values = tiny(model={"num_classes": 3}, training={"label_dropout": 0.1})
    config = make_config(values, "test")
    weights = {
        name: torch.randn_like(t) / 5 for name, t in build_network(config, CPU).state_dict().items()
    }
    path = tmp_path / "toy.pt"
    save_checkpoint(path, Checkpoint("base", "toy", config, 1, 0, weights))
    return path


def test_labels_and_guidance_of_a_conditional_checkpoint(conditional):
    sampler = load_sampler(conditional, device="cpu")
    assert torch.equal(sampler(4), expected(conditional, 4, labels="0,1,2"))
    assert torch.equal(sampler(4, labels=2), expected(conditional, 4, labels="2"))
    labels = torch.tensor([1, -1])
    assert torch.equal(sampler(4, labels=labels), expected(conditional, 4, labels="1,-1"))
    assert not torch.equal(sampler(4, labels=2), sampler(4, labels=1))
    guided = sampler(4, guidance=2.0)
    assert torch.equal(guided, expected(conditional, 4, guidance=2.0))
    assert not torch.equal(guided, sampler(4))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": 3}, "labels 3: classes go from 0 to 2; -1 is none"),
        ({"guidance": -1.0}, "guidance -1.0: take a number from 0 to 1000"),
        ({"count": 0}, "count: 0; take at least 1"),
        ({"batch_size": 0}, "batch_size: 0; take at least 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(conditional, settings, said):
    with pytest.raises(InputError) as caught:
        load_sampler(conditional, device="cpu")(**settings)
    assert str(caught.value) == said


def test_files_and_steps_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        load_sampler(tmp_path / "none.pt")
    with pytest.raises(InputError, match="steps: 0; take at least 1"):
        load_sampler(TEACHER, steps=0)
    with pytest.raises(InputError, match=r"^device meta: not a device of this machine"):
        load_sampler(TEACHER, device="meta")
