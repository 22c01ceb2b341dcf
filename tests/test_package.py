"""The package, its citation, its lock file and the model card of the weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.api import load_sampler

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has the first reader of TOML")

ROOT = Path(__file__).parents[1]
ROOMS = ("diffusion", "models", "pipeline", "training", "evaluation", "utils", "tools")
SCRIPTS = ("train", "distill", "sample", "evaluate", "hubconf")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(path):
    """The requirements in a file and in those that it includes with -r."""
    for line in path.read_text().split("\n"):
        if line.startswith("-r "):
            yield from requirements(path.parent / line.removeprefix("-r "))
        elif line:
            yield line


def required(path):
    """The names of a requirements file, in lower case."""
    return {re.split(r"[<>=\[ ]", text)[0].lower() for text in requirements(path)}


# --- installation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a package is made of: a build writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", folder)
    return folder


def install(source, target, *options):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command += ["--target", str(target), *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def python(target, folder, code):
    """What Python prints in another folder, with the target as a folder of installed packages."""
    code = f"import site; site.addsitedir({str(target)!r})\n{code}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


USED = f"""
import importlib, json, sys
from importlib import metadata
modules = [importlib.import_module(name) for name in {(*ROOMS, *SCRIPTS)!r}]
import torch
from evaluation.digits import load_digit_network
load_digit_network(torch.device("cpu"))
from pipeline.api import load_sampler
images = load_sampler({str(ROOT / "pretrained" / "mnist-1-step.safetensors")!r}, device="cpu")(2)
print(json.dumps({{
    "files": [module.__file__ for module in modules],
    "requires": metadata.requires("progressive-distillation"),
    "version": metadata.version("progressive-distillation"),
    "shape": list(images.shape),
}}))
"""


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["installed", "editable"])
def test_pip_installs_all_that_the_code_needs(source, tmp_path, options):
    target = tmp_path / "target"
    install(source, target, *options)
    found = json.loads(python(target, tmp_path, USED))
    home = source if options else target
    assert {Path(file).parent for file in found["files"]} == {home, *(home / r for r in ROOMS)}
    assert found["shape"] == [2, 1, 32, 32]
    assert found["version"] == PROJECT["version"]
    names = {re.split(r"[<>=\[ ]", text)[0].lower() for text in found["requires"]}
    assert names == required(ROOT / "requirements.txt")
    if not options:
        assert (target / "evaluation" / "digits.safetensors").is_file()


def test_every_folder_with_code_is_in_the_package():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(packaged["packages"]) == folders - {"tests", "benchmarks"}
    assert set(packaged["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


# --- the lock file ------------------------------------------------------------------------------


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_lock_file_has_one_version_of_each_package_and_nothing_else():
    assert all(re.fullmatch(r"[\w.-]+==[0-9][0-9a-z.]*", line) for line in locked())
    names = [line.partition("==")[0].lower().replace("_", "-") for line in locked()]
    assert len(names) == len(set(names))
    assert {name.replace("_", "-") for name in required(ROOT / "requirements-dev.txt")} <= {*names}


def test_locked_versions_are_allowed():
    packaging = pytest.importorskip("packaging.requirements", reason="packaging is missing")
    pairs = (line.split("==") for line in locked())
    versions = {name.lower().replace("_", "-"): version for name, version in pairs}
    for text in requirements(ROOT / "requirements-dev.txt"):
        wanted = packaging.Requirement(text)
        assert wanted.specifier.contains(versions[wanted.name.lower()]), text


# --- the citation and the changelog ---------------------------------------------------------------


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # the format's own
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The progressive-distillation contributors"}]
    (paper,) = citation["references"]
    assert paper["title"] == "Progressive Distillation for Fast Sampling of Diffusion Models"
    assert [author["family-names"] for author in paper["authors"]] == ["Salimans", "Ho"]
    assert paper["year"] == 2022


def test_the_changelog_speaks_of_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert PROJECT["version"] in text


# --- the model card -----------------------------------------------------------------------------

CARD = (ROOT / "pretrained" / "README.md").read_text()


def test_the_cards_code_draws_digits(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    names = {}
    exec(code, names)
    expected = load_sampler(ROOT / "pretrained" / "mnist-8-steps.safetensors")(16, seed=0)
    assert torch.equal(names["images"], expected)


def test_the_card_says_what_the_files_are():
    for path in (ROOT / "pretrained").glob("*.safetensors"):
        size = 0.9e6 if "half-width" in path.name else 3.5e6
        assert path.stat().st_size == pytest.approx(size, rel=0.01)
    small, clean = (
        yaml.safe_load((ROOT / "configs" / f"mnist_{name}.yaml").read_text())["training"]
        for name in ("small", "clean")
    )
    assert f"{small['updates']:,} updates of {small['batch_size']} images" in CARD
    assert f"then {clean['updates']:,} of {clean['batch_size']}" in CARD
