"""Shapes are checked at run time in the tests, before anything of ours is imported."""

import os
from functools import cache
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook(["diffusion", "models", "evaluation"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402

from evaluation.features import Extractor  # noqa: E402
from pipeline import data  # noqa: E402
from pipeline.checkpoint import digest  # noqa: E402

MNIST = Path(__file__).parents[1] / "data" / "mnist"

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


torch.set_num_threads(1)  # tiny networks; the cores are for several tests at a time


@pytest.fixture(autouse=True, scope="session")
def _mnist_is_read_once():
    """Reading and checking the repository's MNIST takes a third of a second."""
    read = data._read_idx
    cached = cache(read)

    def read_once(folder, name, header):
        here = Path(folder).resolve() == MNIST
        return (cached if here else read)(folder, name, header)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_read_idx", read_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _features_are_computed_once():
    """Most tests that measure samples compare them with the same real images."""
    call, known = Extractor.__call__, {}

    def once(self, images, title="features"):
        key = (self.identity, digest(images))
        if key not in known:
            known[key] = call(self, images, title)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "__call__", once)
        yield


LAY_OUT = ConstrainedLayoutEngine.execute


@pytest.fixture(autouse=True, scope="session")
def _figures_are_not_laid_out():
    """Finding room for all labels takes half of a figure's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        yield


@pytest.fixture
def layout(monkeypatch):
    """For a test that looks at a figure: as its reader sees it."""
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", LAY_OUT)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
