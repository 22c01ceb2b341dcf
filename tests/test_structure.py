"""Rules of the structure that a program can check."""

import ast
import importlib
import inspect
import re
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train", "distill", "sample", "evaluate", "hubconf")
# An import only points down this list; benchmarks/ and tests/ may import everything.
ROOMS = ("tools", "evaluation", "training", "pipeline", "models", "diffusion", "utils")
NOT_FOR_THE_PRODUCT = {"benchmarks", "tests", "tools", *SCRIPTS}
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("")
    for room in ROOMS
    for path in (ROOT / room).glob("*.py")
    if path.stem != "__init__"
)


def imports(path):
    """The modules of ours that a file imports."""
    tree = ast.parse((ROOT / path).with_suffix(".py").read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return {name for name in names if name.split(".")[0] in {*ROOMS, *NOT_FOR_THE_PRODUCT}}


def functions(path):
    tree = ast.parse((ROOT / path).with_suffix(".py").read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("module", [*MODULES, *map(Path, SCRIPTS)], ids=str)
def test_imports_only_point_down(module):
    room = module.parts[0]
    below = ROOMS[1:] if room in SCRIPTS else ROOMS[ROOMS.index(room) :]
    assert {name.split(".")[0] for name in imports(module)} <= set(below) - NOT_FOR_THE_PRODUCT | {
        room
    }


def test_the_readme_lists_every_file():
    listed = (ROOT / "README.md").read_text().partition("## How the code is laid out")[2]
    tree = listed.partition("```\n")[2].partition("```")[0]
    rooms = dict(zip(*[iter(re.split(r"(?m)^(\w+)/ .*\n", tree)[1:])] * 2, strict=True))
    for room in ROOMS:
        files = re.findall(r"(?m)^  (\w+)\.py ", rooms[room])
        assert sorted(files) == sorted(m.name for m in MODULES if m.parts[0] == room), room


def test_no_imports_go_round_in_a_circle():
    graph = {".".join(m.parts): imports(m) for m in MODULES}
    done = set()

    def visit(name, above):
        assert name not in above, f"{' -> '.join(above)} -> {name}"
        if name in graph and name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_longer_than_an_idea():
    lengths = {m: len((ROOT / m).with_suffix(".py").read_text().splitlines()) for m in MODULES}
    assert {str(m): n for m, n in lengths.items() if n > 300} == {}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.parts[0] in ("diffusion", "models", "evaluation")], ids=str
)
def test_public_functions_state_their_shapes(module):
    """No tensor of a public signature is without a shape; conftest.py has them checked."""
    loaded = importlib.import_module(".".join(module.parts))
    members = [m for n, m in vars(loaded).items() if not n.startswith("_")]
    members = [m for m in members if getattr(m, "__module__", None) == loaded.__name__]
    for cls in [m for m in members if inspect.isclass(m)]:
        members += [m for n, m in vars(cls).items() if n == "__call__" or not n.startswith("_")]
    checked = [m for m in members if inspect.isfunction(m)]
    assert checked or module.name == "networks", "a table alone"
    for function in checked:
        for name, annotation in inspect.get_annotations(function).items():
            if typing.get_origin(annotation) is not Callable:
                bare = [p for p in (annotation, *typing.get_args(annotation)) if p is Tensor]
                assert not bare, f"{function.__qualname__}: {name} has no shape"


def test_shapes_are_checked_at_run_time():
    import torch

    from diffusion.gaussian import diffuse

    with pytest.raises(Exception, match=r"(?i)type-check"):
        diffuse(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), torch.zeros(3))


def test_functions_fit_on_a_screen_and_scripts_are_short():
    for path in [*MODULES, *map(Path, SCRIPTS)]:
        for function in functions(path):
            length = function.end_lineno - function.lineno + 1
            assert length <= 75, f"{path}: {function.name} has {length} lines"
    for script in SCRIPTS:
        assert len((ROOT / script).with_suffix(".py").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "patch", sorted((ROOT / "tests/mutants").glob("*.patch")), ids=lambda p: p.stem
)
def test_every_mutant_still_applies(patch):
    """make mutants runs them; a change of the code must not leave one behind."""
    result = subprocess.run(
        ["git", "apply", "--check", str(patch)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
