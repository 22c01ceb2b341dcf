"""Entry points for torch.hub, which import from this repository only: see pipeline/api.py.

torch.hub.load(FOLDER, "mnist", steps=2, source="local") returns a function: sample(64, seed=0) ->
uint8 images (64, 1, 32, 32). The repository's packages are imported under their own names (models,
utils, ..), so that a program with packages of the same names should load this one in a process of
its own.
"""

import sys as _sys
from pathlib import Path as _Path

# torch.hub takes every public name of this file that can be called for an entry point.
_ROOT = _Path(__file__).resolve().parent
for _name in ("diffusion", "models", "pipeline", "utils"):
    _module = _sys.modules.get(_name)
    _places = [*map(str, getattr(_module, "__path__", []))]  # of a package, with __init__.py or not
    if _module is not None and _ROOT / _name not in [_Path(_place).resolve() for _place in _places]:
        _origin = ", ".join(_places) or getattr(_module, "__file__", None)
        raise ImportError(
            f"{_name} is already imported from {_origin}, and this repository has a package of "
            "that name; load it in a process of its own"
        )

from pipeline import api as _api  # noqa: E402

dependencies = ["torch", "einops", "jaxtyping", "numpy", "PIL", "pydantic", "safetensors"]
dependencies += ["tqdm", "yaml"]


def mnist(
    steps: int | None = None, device: str | None = None, kind: str = "adversarial"
) -> _api.Sampler:
    """Returns a sampler of the released MNIST weights: sample(64, seed=0) -> (64, 1, 32, 32).

    steps: of a student (8 and 1, of most kinds 4 and 2 too); more for the teacher in so many DDIM
    steps; None for the teacher in its own number. device: by default a GPU if there is one. kind:
    which students, by their file names: "adversarial", "tract", "half-width", "by-class", or "" for
    the progressive ones.
    """
    return _api.load_published(_ROOT / "pretrained", "mnist", steps, device, kind)


def load(
    checkpoint: _Path | str, steps: int | None = None, device: str | None = None
) -> _api.Sampler:
    """Returns a sampler of any checkpoint file: sample(64, seed=0, labels=[3], guidance=2.0)."""
    return _api.load_sampler(checkpoint, steps, device)
