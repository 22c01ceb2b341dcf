"""Checkpoints made to do harm: pickles of many opcodes and gadgets, none of which may run."""

import contextlib
import io
import os
import pickle
import random
import resource
import zipfile
from collections import Counter

import pytest
import torch

from tests.utils.test_checkpoint import checkpoint
from utils.checkpoint import digest, load_checkpoint, save_checkpoint
from utils.command import InputError
from utils.runs import newest_whole, numbered

# module, name, and what it is called with; {0} is a file that must not appear
GADGETS = [
    ("os", "system", "touch {0}"),
    ("posix", "system", "touch {0}"),
    ("os", "mkdir", "{0}"),
    ("posix", "mkdir", "{0}"),
    ("os", "popen", "touch {0}"),
    ("os", "makedirs", "{0}"),
    ("subprocess", "getoutput", "touch {0}"),
    ("subprocess", "getstatusoutput", "touch {0}"),
    ("builtins", "eval", "open('{0}', 'w')"),
    ("builtins", "exec", "open('{0}', 'w')"),
    ("timeit", "timeit", "open('{0}', 'w')"),
    ("platform", "popen", "touch {0}"),
    ("pty", "spawn", "{0}"),
    ("runpy", "run_path", "{0}"),
    ("torch", "load", "{0}"),
    ("torch.utils.collect_env", "run", "touch {0}"),
    ("pathlib", "Path", "{0}"),
    ("importlib", "import_module", "antigravity"),
    ("code", "interact", "{0}"),
    ("tempfile", "mkdtemp", "{0}"),
    ("cProfile", "run", "open('{0}', 'w')"),
    ("pickle", "loads", "{0}"),
    ("functools", "partial", "{0}"),
    ("operator", "methodcaller", "system"),
    ("numpy.testing._private.utils", "runstring", "open('{0}', 'w')"),
]


def short(text):
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


# Each is a way of the pickle machine to call something.
STYLES = {
    "GLOBAL REDUCE": lambda m, n, a: f"c{m}\n{n}\n(V{a}\ntR.".encode(),
    "INST": lambda m, n, a: f"(V{a}\ni{m}\n{n}\n.".encode(),
    "OBJ": lambda m, n, a: f"(c{m}\n{n}\nV{a}\no.".encode(),
    "STACK_GLOBAL REDUCE": lambda m, n, a: (
        b"\x80\x04" + short(m) + short(n) + b"\x93" + short(a) + b"\x85R."
    ),
    "NEWOBJ": lambda m, n, a: f"\x80\x02c{m}\n{n}\n(V{a}\nt\x81.".encode("latin-1"),
    "NEWOBJ_EX": lambda m, n, a: (
        b"\x80\x04" + short(m) + short(n) + b"\x93" + short(a) + b"\x85}\x92."
    ),
    "in a dict, memoised": lambda m, n, a: (
        f"\x80\x02}}q\x00X\x01\x00\x00\x00ac{m}\n{n}\nq\x01(V{a}\ntRs.".encode("latin-1")
    ),
}
CONTAINERS = ("bare", "archive")


def contained(payload, container):
    if container == "bare":
        return payload
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("style", STYLES)
def test_no_hostile_pickle_runs(tmp_path, style, container):
    assert len(GADGETS) * len(STYLES) * len(CONTAINERS) >= 150
    marker = tmp_path / "executed"
    for module, name, argument in GADGETS:
        path = tmp_path / "a.pt"
        payload = STYLES[style](module, name, argument.format(marker))
        path.write_bytes(contained(payload, container))
        with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
            load_checkpoint(path)
        assert not marker.exists(), f"{module}.{name} was executed"
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("style", ["GLOBAL REDUCE", "INST", "OBJ", "STACK_GLOBAL REDUCE"])
def test_the_pickles_are_live(tmp_path, style):
    """They do what they say where pickle is trusted: the test above can fail."""
    marker = tmp_path / "executed"
    pickle.loads(STYLES[style]("os", "mkdir", str(marker)))
    assert marker.exists()


DAMAGED = int(os.environ.get("DAMAGED", 100))
KINDS = ("cut", "flipped", "zeros", "swapped", "disk full")


def damage(path, kind, rng):
    """Does to the file what an accident would."""
    data = bytearray(path.read_bytes())
    at, length = rng.randrange(len(data)), rng.randrange(1, 4096)
    if kind == "cut":
        data = data[:at]
    elif kind == "flipped":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        middle = len(data) // 2
        data = data[middle:] + data[:middle]
        data[at] ^= 255
    path.write_bytes(data)


@contextlib.contextmanager
def files_no_longer_than(size):
    """What a full disk does to a writer: the system refuses what goes beyond."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    """Cut, a bit flipped, zeros written over, parts swapped: found, and the one before is taken."""
    before, newest = tmp_path / "diffusion-1.pt", tmp_path / "diffusion-2.pt"
    older, newer = checkpoint(update=1), checkpoint(update=2)
    save_checkpoint(before, older)
    save_checkpoint(newest, newer)
    whole, rng = newest.read_bytes(), random.Random(1)
    contents = {path: digest(vars(load_checkpoint(path))) for path in (before, newest)}
    found = Counter()
    for n in range(DAMAGED):
        kind = KINDS[n % len(KINDS)]
        if kind == "disk full":
            newest.unlink()
            with (
                files_no_longer_than(rng.randrange(len(whole))),
                pytest.raises(OSError, match="not written"),
            ):
                save_checkpoint(newest, newer)
        else:
            newest.write_bytes(whole)
            damage(newest, kind, rng)
        path, taken = newest_whole(numbered(tmp_path, "diffusion-"))
        assert digest(vars(taken)) == contents[path]
        found[kind] += path == before
        # what was hit and is not found is not read: padding, or zeros over zeros
        assert path == before or kind in ("flipped", "zeros")
        assert not list(tmp_path.glob(".*.tmp"))
        newest.write_bytes(whole)
    print(f"\n{DAMAGED} damaged checkpoints, by kind those whose content was hit: {dict(found)}")
    assert found.total() > 0.85 * DAMAGED


def test_tensors_alone_are_loaded(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path)
