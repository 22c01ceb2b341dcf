"""Kills, damaged files, and checkpoints made to do harm: pickles that run code, entries that lead
out of a folder or ask for too much memory. None does."""

import contextlib
import copy
import io
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import yaml

import distill
import evaluate
import sample
import train
from pipeline.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    digest,
    load_checkpoint,
    publish_checkpoint,
    save_checkpoint,
)
from tests.commands import refused, run
from tests.pipeline.test_checkpoint import GRID, checkpoint, entries_of, save_entries
from tests.processes import peak_memory, reset_peak_memory
from tests.toys import tiny
from training.resume import newest_whole, numbered
from training.stage import Stage
from utils.command import InputError, handled

KILLS = os.environ.get("KILLS", "8")


def test_a_killed_run_loses_nothing():
    """A few kills of the scripts that train; make torture does two hundred."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", KILLS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=100 + 50 * int(KILLS),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(f"\n{result.stdout}")
    kills, inside = re.search(r"(\d+) kills, (\d+) of them", result.stdout).groups()
    assert kills == KILLS
    assert int(inside) >= int(kills) / 4
    assert "all the same" in result.stdout
    for place in ("a process of its own: at random", "stage > save > "):
        assert place in result.stdout


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


# --- valid files changed, their digests too -----------------------------------------------------

HOSTILE = int(os.environ.get("HOSTILE", 40))
MUTATIONS = ("removed", "retyped", "enlarged", "swapped", "led astray")
PATHS = ("../../victim", "../victim", "..", ".", "", "victim/../..", "a\0b", "a\nb", "\udc80")
VALUES = (None, True, 0, -1, 2**62, 2**70, 1.5, float("nan"), float("inf"), "x", [], {}, [[[]]])
GIB = 2**30


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Valid checkpoints of several kinds and networks."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    given = ("--config_path", folder / "tiny.yaml", "--output", folder / "base")
    assert run(train, *given, "--set", "training.updates=1") == 0
    base = load_checkpoint(folder / "base" / "diffusion-1.pt")
    student = replace(
        base, kind="student", stage=1, grid=GRID, sampler="ddim", ema=None, optimizer=None
    )
    other = tiny(model={"channels": 12, "num_classes": 10}, diffusion={"prediction": "both"})
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    given = ("--config_path", folder / "other.yaml", "--output", folder / "other")
    assert run(train, *given, "--set", "training.updates=1") == 0
    paths = [folder / name for name in ("base.pt", "student.pt", "other.pt", "a.safetensors")]
    shutil.copy(folder / "base" / "diffusion-1.pt", paths[0])
    save_checkpoint(paths[1], student)
    shutil.copy(folder / "other" / "diffusion-1.pt", paths[2])
    publish_checkpoint(paths[3], student, half=True)
    return paths


def published_entries(path):
    with safetensors.safe_open(path, "pt") as file:
        model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entries = {name: json.loads(text) for name, text in file.metadata().items()}
    return {**{k: v for k, v in entries.items() if k in entries_kept(entries)}, "model": model}


def entries_kept(entries):
    return entries.keys() - {"format", "format_version", "digest"}


def save_published(path, entries):
    """As publish_checkpoint would, unchecked; tensors that are none in such a file are left out."""
    model = entries["model"] if isinstance(entries.get("model"), dict) else {}
    model = {
        str(k): (v if v.numel() < 2**24 else torch.zeros(2**22)).contiguous()
        for k, v in model.items()
        if isinstance(v, torch.Tensor)
    }
    header = {k: v for k, v in entries.items() if k != "model"}
    kept = {**header, "model": model}
    header |= {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": digest(kept)}
    texts = {name: json.dumps(value, default=str) for name, value in header.items()}
    path.write_bytes(safetensors.torch.save(model, texts))


def places(value, path=()):
    """The paths of all that is in nested mappings and lists."""
    if path:
        yield path
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from places(item, (*path, key))


def chosen(rng, entries):
    """A place, whose depth and section are drawn first, as most of all are tensors' names."""
    by_section = defaultdict(list)
    for path in places(entries):
        by_section[path[0], len(path) > 1].append(path)
    return rng.choice(by_section[rng.choice(sorted(by_section))])


def enlarged(rng, value):
    """The same kind of value, far larger."""
    if isinstance(value, torch.Tensor):
        ways = [
            lambda: value.reshape(-1)[:1].expand(2 ** rng.choice((20, 33, 40))),
            lambda: value.reshape(-1)[:1].reshape(1, 1).expand(2**30, 2**30),
            lambda: torch.cat([value.reshape(-1)] * 3),
            lambda: value[None].expand(100, *value.shape),
            lambda: torch.full_like(value, float("inf")),
        ]
        return rng.choice(ways)()
    if isinstance(value, dict):
        return value | {f"more-{n}": n for n in range(10_000)}
    if isinstance(value, list):
        return (value or [1])[:100] * rng.choice((2, 20, 1000))
    if isinstance(value, str):
        return value[:100] * rng.choice((2, 100_000))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value * rng.choice((2, 16, 1000, 2**20)) + rng.choice((0, 1, 2**40))
    return 2**20


def mutated(rng, kind, entries, others):
    """The entries, changed at one to three places."""
    entries = copy.deepcopy(entries)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *above, last = chosen(rng, entries)
        inner = entries
        for key in above:
            inner = inner[key]
        if kind == "removed":
            del inner[last]
        elif kind == "retyped":
            inner[last] = rng.choice([*VALUES, torch.zeros(3), torch.tensor(1), "y" * 100_000])
        elif kind == "enlarged":
            inner[last] = enlarged(rng, inner[last])
        elif kind == "swapped":
            other = rng.choice(others)
            entry = rng.choice(sorted(other))
            entries[entry] = copy.deepcopy(other[entry])
        else:
            name = rng.choice(["name", "name", "root", "output"])
            place = entries if name == "name" else entries.get("config", {})
            if name == "root":
                place = place.get("data", {})
            place[name] = rng.choice(PATHS)
    return entries


def below(folder, but):
    """All files below the folder with their content, and folders, but those of one."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path != but and but not in path.parents
    }


def in_a_child(said, folder, work):
    """The exit code of the work in a process of its own, what it said, and the memory it took."""
    child = os.fork()
    if child:
        deadline = time.monotonic() + 120
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(ended[1])
        *lines, memory = said.read_text(errors="replace").splitlines() or [""]
        return code, lines, int(memory) if memory.isdecimal() else None
    code = 99
    try:
        os.chdir(folder)
        with said.open("w", errors="backslashreplace") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            reset_peak_memory()
            before = peak_memory()
            limit = resource.getrlimit(resource.RLIMIT_AS)[1]
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 4 * GIB, limit))
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
            print(f"\n{peak_memory() - before}", flush=True)
    finally:
        os._exit(code)


def commands(path, out):
    """What is done with a hostile checkpoint."""
    drawn = ("--checkpoint", path, "--count", 2, "--steps", 2, "--output", out)
    recipe = ("first_steps=2", "iterations=1", "updates_per_stage=1", "batch_size=8")
    settings = [f"distillation.{setting}" for setting in recipe] + ["sampling.grid=4"]
    settings += [f"data.root={Path(__file__).parents[1] / 'data'}"]
    taught = ("--teacher_model_checkpoint", path, "--output", out, "--restart")
    return [
        lambda: run(sample, *drawn, "--seed", 1),
        lambda: run(distill, *taught, "--set", *settings),
    ]


def test_a_hostile_checkpoint_is_refused_or_harmless(tmp_path, sources):
    """Refused in one line, or used: in bounded memory, and nothing is touched but the output."""
    victim, cwd, out = tmp_path / "victim", tmp_path / "a" / "b", tmp_path / "a" / "out"
    shutil.copytree(sources[0].parent, victim)
    cwd.mkdir(parents=True)
    read = [published_entries if p.suffix == ".safetensors" else entries_of for p in sources]
    valid = [reader(path) for reader, path in zip(read, sources, strict=True)]
    results, most = defaultdict(Counter), 0
    for n in range(HOSTILE):
        rng = random.Random(n)
        kind, source = MUTATIONS[n % len(MUTATIONS)], sources[n // len(MUTATIONS) % len(sources)]
        entries = mutated(rng, kind, valid[sources.index(source)], valid)
        path = tmp_path / "in" / f"{n}{source.suffix}"
        path.parent.mkdir(exist_ok=True)
        (save_published if source.suffix == ".safetensors" else save_entries)(path, entries)
        before = below(tmp_path, out)
        work = commands(path, out)[rng.random() < 0.2]
        code, lines, memory = in_a_child(tmp_path.with_suffix(".said"), cwd, work)
        told = f"{n}: {kind}, of {source.name}: {lines[-3:]}"
        assert below(tmp_path, out) == before, told
        assert code in (0, 2), told
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == (code == 2), told
        assert memory is not None, told
        assert memory < GIB, told
        assert code == 2 or any(out.iterdir()), told
        results[kind]["harmless" if code == 0 else "refused"] += 1
        most = max(most, memory)
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()
    told = "; ".join(f"{kind}: {dict(counts)}" for kind, counts in results.items())
    print(f"\n{HOSTILE} hostile checkpoints, at most {most / 2**20:.0f} MiB: {told}")
    totals = sum(results.values(), Counter())
    assert totals["refused"] > HOSTILE // 3


def touch_a_gibibyte():
    """Takes new memory, not what earlier tests have freed, and fills it with more than zeros."""
    with mmap.mmap(-1, GIB) as memory:
        for page in range(0, GIB, mmap.PAGESIZE):
            memory[page] = 1
    return 0


def test_the_watch_sees_what_is_touched(tmp_path):
    """The test above can fail: of a child's memory, its traceback and the files that it writes."""
    (tmp_path / "out").mkdir()
    said, out = tmp_path.with_suffix(".said"), tmp_path / "out"
    before = below(tmp_path, out)
    code, lines, memory = in_a_child(said, tmp_path, touch_a_gibibyte)
    assert (code, lines[-1]) == (0, "")
    assert 0.99 * GIB <= memory < 1.2 * GIB
    code, lines, _ = in_a_child(said, tmp_path, lambda: Path("x").write_text("") or 1 / 0)
    assert code == 99
    assert "ZeroDivisionError: division by zero" in lines
    assert below(tmp_path, out) != before


# --- by name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_a_name_leads_no_ladder_out_of_its_folder(tmp_path, sources, monkeypatch, capsys, absolute):
    """Nothing is written there, and nothing deleted by --restart."""
    victim, cwd = tmp_path / "b" / "victim", tmp_path / "a" / "run"
    (victim / "tensorboard").mkdir(parents=True)
    (victim / "student-2.pt").write_bytes(b"theirs")
    cwd.mkdir(parents=True)
    monkeypatch.chdir(cwd)
    name = str(victim) if absolute else "../../../../b/victim"
    entries = entries_of(sources[0]) | {"name": name}
    entries["config"]["data"]["root"] = str(Path(__file__).parents[1] / "data")
    save_entries(tmp_path / "x.pt", entries)
    before = below(tmp_path, None)
    given = ("--teacher_model_checkpoint", tmp_path / "x.pt", "--restart")
    for script, arguments in (
        (distill, given),
        (sample, ("--checkpoint", tmp_path / "x.pt", "--count", 1)),
        (evaluate, ("--checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out")),
    ):
        assert "x.pt: name: " in refused(capsys, script, *arguments)
        assert below(tmp_path, None) == before


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "cifar10"])
def test_nothing_is_downloaded_into_a_folder_that_a_checkpoint_names(
    tmp_path, sources, monkeypatch, capsys, name
):
    entries = entries_of(sources[0])
    root = str(tmp_path / "victim")
    entries["config"]["data"] |= {"name": name, "root": root}
    save_entries(tmp_path / "x.pt", entries)
    asked = []
    monkeypatch.setattr(
        "pipeline.build.open_dataset", lambda name, root, *_: asked.append(root) or 0
    )
    given = ("--teacher_model_checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out")
    line = refused(capsys, distill, *given)
    assert f"x.pt: data.root: '{root}' is the checkpoint's, and {name} may be downloaded" in line
    assert "--set data.root=DIR" in line
    drawn = ("--checkpoint", tmp_path / "x.pt", "--output", tmp_path / "out")
    assert "(--data_root DIR)" in refused(capsys, evaluate, *drawn)
    assert not asked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]
    with pytest.raises(AttributeError):  # of what is no data set here
        run(distill, *given, "--set", f"data.root={root}")
    assert asked == [root], "named by the user"


def test_a_run_never_saves_weights_that_are_not_finite(tmp_path, capsys, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    monkeypatch.setattr(Stage, "rate_at", lambda stage, update: 1e39)
    for every, updates in ((1, 4), (100, 4)):
        settings = [f"training.checkpoint_every={every}", f"training.updates={updates}"]
        out = tmp_path / str(every)
        line = refused(capsys, train, "--config_path", config, "--output", out, "--set", *settings)
        update = min(every, updates)
        assert f"diffusion-{update}.pt: not written: 'model.time_in.weight' is not finite" in line
        assert "begin anew (--restart, or another --output) with a lower learning rate" in line
        assert not list(out.glob("*.pt"))


def test_a_pipe_as_a_checkpoint_is_not_waited_for(tmp_path, sources, capsys):
    pipe = tmp_path / "out" / "diffusion-1.pt"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    config = sources[0].parent / "tiny.yaml"
    for script, arguments in (
        (train, ("--config_path", config, "--output", pipe.parent)),
        (train, ("--config_path", config, "--output", tmp_path / "x", "--initialise", pipe)),
        (distill, ("--teacher_model_checkpoint", pipe, "--output", tmp_path / "x")),
        (sample, ("--checkpoint", pipe)),
        (evaluate, ("--checkpoint", pipe, "--output", tmp_path / "x")),
    ):
        with handled(signal.SIGALRM, lambda *_: pytest.fail("hangs")):
            signal.alarm(60)
            try:
                said = refused(capsys, script, *arguments)
            finally:
                signal.alarm(0)
        assert f"{pipe}: no" in said
        assert "regular file" in said
    assert pipe.exists()
