"""Shapes are checked at run time in the tests, before anything of ours is imported."""

import os

from jaxtyping import install_import_hook

install_import_hook(["diffusion", "models", "evaluation"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


torch.set_num_threads(1)  # tiny networks; the cores are for several tests at a time


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
