import errno
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import socket
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffusion.grids import uniform_grid
from pipeline.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    NOT_PUBLISHED,
    Checkpoint,
    digest,
    load_checkpoint,
    publish_checkpoint,
    save_checkpoint,
)
from pipeline.config import make_config
from pipeline.network import build_network, load_weights
from tests.processes import peak_memory, reset_peak_memory
from tests.toys import COSINE, tiny
from training.resume import newest_whole
from utils.command import DamagedCheckpoint, InputError, handled
from utils.files import atomic_write

GRID = (-20.0, -1.0, 0.5, 2.0, math.inf)


def checkpoint(**changes):
    config = make_config(tiny(), "tiny")
    network = build_network(config, torch.device("cpu"))
    values = {
        "kind": "base",
        "name": "tiny",
        "config": config,
        "update": 3,
        "stage": 0,
        "model": network.state_dict(),
        "ema": {k: v + 1 for k, v in network.state_dict().items()},
    }
    return Checkpoint(**values | changes)


def save_entries(path, entries):
    """Saves the entries of a checkpoint unchecked, with the digest that belongs to them.

    With none where they hold more than memory does: then nobody may try to compute it.
    """

    def largest(value):
        items = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list, tuple)):
            return max(map(largest, items), default=0)
        return value.numel() if isinstance(value, torch.Tensor) else 0

    own = digest(entries) if largest(entries) < 2**28 else ""
    torch.save(entries | {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": own}, path)


def entries_of(path):
    """The entries as they are in the file, its head aside."""
    content = torch.load(path, weights_only=True)
    return {k: v for k, v in content.items() if k not in ("format", "format_version", "digest")}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.pt"
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    save_checkpoint(path, checkpoint(optimizer=optimizer))
    return path


@pytest.fixture
def at_most_3_gib():
    """What asks for more memory than that gets none, and what waits is ended."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, before[1]))
    with handled(signal.SIGALRM, lambda *_: pytest.fail("hangs")):
        signal.alarm(60)
        yield
        signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_checkpoint_reads_as_it_was_written(tmp_path):
    path = tmp_path / "a.pt"
    before = checkpoint(
        grid=GRID, sampler="ddim", kind="student", stage=1, lineage={"teacher": "x"}
    )
    save_checkpoint(path, before)
    after = load_checkpoint(path)
    for field in ("kind", "name", "config", "update", "stage", "grid", "sampler", "lineage"):
        assert getattr(after, field) == getattr(before, field)
    assert digest(after.model) == digest(before.model)
    assert digest(after.weights) == digest(before.ema) != digest(before.model)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_weights_of_a_gpu_are_published(tmp_path):
    """There they lie channels_last, which safetensors refuses."""
    before = checkpoint(ema=None)
    model = {
        name: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
        for name, t in before.model.items()
    }
    assert not all(t.is_contiguous() for t in model.values())
    for half in (False, True):
        publish_checkpoint(tmp_path / "a.safetensors", checkpoint(model=model, ema=None), half)
        after = load_checkpoint(tmp_path / "a.safetensors")
        assert after.model.keys() == before.model.keys()
        for name, value in after.model.items():
            torch.testing.assert_close(value, model[name], rtol=1e-3, atol=1e-6)


def test_weights_are_the_average_where_there_is_one():
    assert checkpoint().weights is not checkpoint().model
    alone = checkpoint(ema=None)
    assert alone.weights is alone.model


def test_a_digest_is_of_the_numbers_whatever_their_strides():
    numbers = torch.arange(12.0)
    for strided in (
        numbers[:1].expand(5),
        numbers[::3],
        numbers[4:5].as_strided((1,), (7,)),
        numbers.reshape(3, 4).T,
        numbers.reshape(1, 3, 2, 2).to(memory_format=torch.channels_last),
        numbers[3],
        numbers[:0],
    ):
        copied = torch.tensor(strided.tolist()).reshape(strided.shape)
        assert digest(strided) == digest(copied)
    assert digest(numbers[::3]) != digest(numbers[:4])


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/executed-by-a-checkpoint", "w"))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "not a checkpoint"),
        (b"PK\x03\x04 not a zip", "not a checkpoint"),
        (pickle.dumps(Hostile()), "not a checkpoint"),
        (pickle.dumps({"format": "progressive-distillation"}), "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_unexecuted(tmp_path, content, hint):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=hint):
        load_checkpoint(path)
    torch.save({"model": Hostile()}, path)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not Path("/tmp/executed-by-a-checkpoint").exists()


def test_foreign_and_older_files_are_named(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="folder"):
        load_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    torch.save({"format": "progressive-distillation", "format_version": 0}, path)
    with pytest.raises(InputError, match="format version 0; this code reads 1 and 2"):
        load_checkpoint(path)
    head = {"format": "progressive-distillation", "format_version": 1}
    torch.save(head, path)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    for content, hint in (
        ({"config": {}, "update": 3}, "kind: missing"),
        ({"config": {}, "weights": {}}, "'weights': unknown; known: kind, name"),
        ({"config": "abc"}, "its config: missing, or not a mapping"),
        ({"config": {}, "model": 3, "update": 1}, "kind: missing"),
    ):
        torch.save(content | head | {"digest": digest(content)}, path)
        with pytest.raises(InputError, match=rf"a\.pt: .*{hint}"):
            load_checkpoint(path)
    endless: list = []
    endless.append(endless)
    torch.save({"x": endless} | head | {"digest": ""}, path)
    with pytest.raises(InputError, match="nested too deeply"):
        load_checkpoint(path)
    content = {"config": {"model": {"chanels": 3}}}
    torch.save(content | head | {"digest": digest(content)}, path)
    with pytest.raises(InputError, match=r"its config: model.chanels: unknown key"):
        load_checkpoint(path)


def test_damage_anywhere_is_found(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, checkpoint())
    whole = path.read_bytes()
    rng = random.Random(0)
    before = load_checkpoint(path)
    for n in range(60):
        damaged = bytearray(whole)
        if n % 3 == 0:
            damaged = damaged[: rng.randrange(len(whole))]
        else:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            after = load_checkpoint(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        # a flipped bit of the archive's padding changes nothing that is read
        assert digest(vars(after)) == digest(vars(before))


def test_weights_of_another_shape_are_refused(tmp_path):
    other = build_network(make_config(tiny(model={"channels": 16}), "x"), torch.device("cpu"))
    with pytest.raises(InputError, match=r"a\.pt: weights of another network"):
        load_weights(other, checkpoint().model, tmp_path / "a.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, checkpoint(update=1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(path, checkpoint(update=2))
    assert caught.value.filename == str(path)
    assert load_checkpoint(path).update == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_under_torch_save_is_an_oserror(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match="No space left"),
        atomic_write(tmp_path / "a.pt"),
    ):
        torch.save({"a": torch.zeros(10000)}, Full())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read now: Input/output error"),
        (MemoryError(), "not enough memory to read it"),
    ],
)
def test_what_passes_by_is_no_damage(tmp_path, monkeypatch, error, hint):
    """A file that cannot be read now may be read tomorrow: it is not set aside."""

    def fail(*args, **kwargs):
        raise error

    path = tmp_path / "diffusion-1.pt"
    save_checkpoint(path, checkpoint())
    monkeypatch.setattr("pipeline.checkpoint.torch.load", fail)
    with pytest.raises(InputError, match=hint) as raised:
        newest_whole([path])
    assert not isinstance(raised.value, DamagedCheckpoint)
    assert path.exists()


# --- entries that cannot be -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value", "hint"),
    [
        ("name", "../../victim", r"name: '../../victim': take at most 200 bytes"),
        ("name", "/etc", "name: '/etc': "),
        ("name", "..", "name: '..': "),
        ("name", "", "name: '': "),
        ("name", "a\0b", r"name: 'a\\x00b': "),
        ("name", "a\nb", r"name: 'a\\nb': "),
        ("name", "a\udc80", "name: "),
        ("name", "x" * 201, "name: 'xxx"),
        ("name", 3, "name: input should be a valid string"),
        ("kind", "evil", "kind: input should be 'base', 'student' or 'autoencoder' .it is 'evil'"),
        ("kind", ["base"], "kind: input should be 'base', 'student' or 'autoencoder'"),
        ("kind", "student", "kind: student, but stage is 0, num_steps None"),
        ("grid", [-20.0, 0.0], "kind: base, but stage is 0, num_steps 2 "),
        ("grid", [], "grid: a grid has at least two levels"),
        ("grid", [0.0, 0.0], "grid: a grid's noise must decrease"),
        ("grid", [1.0, 0.0], "grid: a grid's noise must decrease"),
        ("grid", [math.nan], "grid: a grid's levels are finite"),
        ("grid", [math.inf], "grid: a grid's levels are finite"),
        ("grid", [True], "grid.0: input should be a valid number"),
        ("grid", 8, "grid: input should be a valid tuple"),
        ("sampler", "ddim", "kind: base, but stage is 0, num_steps None and sampler ddim"),
        ("sampler", "evil", "sampler: unknown sampler 'evil'"),
        ("update", -3, "update: input should be greater than or equal to 0 .it is -3"),
        ("update", True, "update: input should be a valid integer .it is True"),
        ("update", 3.0, "update: input should be a valid integer"),
        ("update", 2**70, "'update' is a number out of range"),
        ("stage", -1, "stage: input should be greater than or equal to 0"),
        ("lineage", {"teacher": 3}, "lineage.teacher: input should be a valid string"),
        ("lineage", {str(n): "" for n in range(9)}, "lineage: dictionary should have at most 8"),
        ("lineage", {"x": "y" * 201}, "lineage.x: string should have at most 200"),
        ("scaler", {"scale": 1.0}, "scaler: not a mapping of scale, "),
        ("scaler", 3, "scaler: not a mapping of scale, "),
        ("optimizer", [3], "optimizer: input should be a valid dictionary"),
        ("ema", {3: torch.zeros(1)}, "ema: not a mapping of names to tensors"),
        ("model", {}, r"model: not the network of its config: \d+ missing: time_in"),
        ("model", {"x": 3}, "model: 'x' is not a tensor of floating-point numbers"),
        ("model", {"x": torch.zeros(1, dtype=torch.int64)}, "model: 'x' is not a tensor of fl"),
        ("model", {1.5: torch.zeros(1)}, "'model' is a key of another type"),
        ("config", [], "its config: missing, or not a mapping"),
        ("weights", {}, "'weights': unknown; known: kind, name, config"),
    ],
)
def test_an_entry_that_cannot_be_is_named(saved, entry, value, hint):
    save_entries(saved, entries_of(saved) | {entry: value})
    with pytest.raises(InputError, match=rf"a\.pt: ({hint})") as raised:
        load_checkpoint(saved)
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, DamagedCheckpoint), "it is as it was saved"


@pytest.mark.parametrize("entry", ["kind", "name", "update", "stage", "model"])
def test_a_missing_entry_is_named(saved, entry):
    save_entries(saved, {k: v for k, v in entries_of(saved).items() if k != entry})
    with pytest.raises(InputError, match=rf"a\.pt: {entry}: missing"):
        load_checkpoint(saved)


def test_a_version_is_a_number(saved):
    torch.save(torch.load(saved, weights_only=True) | {"format_version": True}, saved)
    with pytest.raises(InputError, match="format version True; this code reads 1 and 2"):
        load_checkpoint(saved)


def test_what_the_code_makes_is_checked_too():
    for changes in ({"name": "a/b"}, {"update": -1}, {"grid": GRID}, {"model": None}):
        with pytest.raises(ValueError, match="1 validation error"):
            checkpoint(**changes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (("model", "conv_in.weight"), "model.conv_in.weight"),
        (("ema", "time_out.bias"), "ema.time_out.bias"),
        (("optimizer", "state", 0, "exp_avg_sq"), "optimizer.state.0.exp_avg_sq"),
    ],
)
def test_weights_that_are_not_finite_are_named(saved, where, name, bad):
    entries = entries_of(saved)
    tensor = entries
    for key in where:
        tensor = tensor[key]
    tensor.view(-1)[-1] = bad
    save_entries(saved, entries)
    with pytest.raises(InputError, match=rf"a\.pt: '{name}' is not finite"):
        load_checkpoint(saved)


def test_large_finite_weights_are_weights(saved):
    entries = entries_of(saved)
    entries["model"]["conv_in.weight"].fill_(3.4e38)
    save_entries(saved, entries)
    assert load_checkpoint(saved).model["conv_in.weight"].max() > 3e38


def test_no_file_is_written_that_could_not_be_read(saved, tmp_path):
    whole = saved.read_bytes()
    broken = checkpoint()
    broken.ema["conv_in.bias"][0] = torch.nan
    with pytest.raises(InputError, match=r"a\.pt: not written: 'ema.conv_in.bias' is not finite"):
        save_checkpoint(saved, broken)
    assert saved.read_bytes() == whole
    large = checkpoint(ema=None)
    large.model["conv_in.bias"][0] = 1e5
    published = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"as in half precision: 'conv_in.bias' is not finite"):
        publish_checkpoint(published, large, half=True)
    assert not published.exists()
    publish_checkpoint(published, large, half=False)
    assert load_checkpoint(published).model["conv_in.bias"][0] == 1e5


# --- paths ------------------------------------------------------------------------------------


def test_a_path_may_be_a_string(saved, tmp_path):
    assert digest(load_checkpoint(str(saved)).model) == digest(load_checkpoint(saved).model)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(str(tmp_path / "b.pt"))


@pytest.mark.parametrize("name", ["diffusion-1.pt", "a.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket.socket(1).bind(str(path))])
def test_only_regular_files_are_read(tmp_path, monkeypatch, at_most_3_gib, make, name):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = tmp_path / name
    make(path.relative_to(tmp_path))
    for read in (load_checkpoint, lambda path: newest_whole([path])):
        with pytest.raises(InputError, match="not a regular file; pipes, sockets and devices"):
            read(path)
    assert path.exists(), "it is not set aside"


@pytest.mark.parametrize("function", ["digest", "misfit", "make_config"])
def test_an_error_of_the_code_is_not_taken_for_damage(saved, monkeypatch, function):
    def broken(*args):
        raise AttributeError("a mistake in the code")

    monkeypatch.setattr(f"pipeline.checkpoint.{function}", broken)
    with pytest.raises(AttributeError, match="a mistake in the code"):
        newest_whole([saved])
    assert saved.exists()


def test_a_lack_of_memory_is_not_taken_for_damage(saved, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..")

    monkeypatch.setattr("pipeline.checkpoint.torch.load", full)
    with pytest.raises(InputError, match="not enough memory to read it"):
        newest_whole([saved])
    assert saved.exists()


# --- small files that stand for large values --------------------------------------------------


def test_a_network_too_large_is_never_built(saved, at_most_3_gib):
    for sizes, hint in (
        ({"channels": 2**14, "channel_multipliers": [2**20, 2**20]}, "larger than any memory"),
        (
            {"channels": 2**14},
            r"\d+ of another shape: time_in.weight \(32, 8\), not \(65536, 16384",
        ),
        ({"blocks_per_level": 64}, r"\d+ missing: down.0.blocks.1"),
    ):
        entries = entries_of(saved)
        config = entries["config"]
        entries["config"] = config | {"model": config["model"] | sizes}
        other = saved.with_name("b.pt")
        save_entries(other, entries)
        with pytest.raises(InputError, match=rf"b\.pt: model: not the network .*{hint}"):
            load_checkpoint(other)


def doubled(times):
    """A list that is short in a pickle and long when gone through."""
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (torch.zeros(1).expand(2**40), "'ema.x' is larger than the file"),
        (torch.zeros(1).expand(2**30, 2**30), "'ema.x' is larger than the file"),
        (torch.zeros(0, 2**40), "ema: not the network of its config"),
        (doubled(14), "'ema.x.*' is (larger|nested)"),
        (torch.zeros(2, dtype=torch.complex64), "not a checkpoint"),
        (torch.zeros(2).to_sparse(), "not a checkpoint"),
        (torch.zeros(2, device="meta"), "not a checkpoint"),
        (torch.nn.Parameter(torch.zeros(2)), "not a checkpoint"),
        ({1, 2}, "not a checkpoint"),
        (1j, "not a checkpoint"),
        (bytearray(3), "not a checkpoint"),
    ],
)
def test_what_is_not_tensors_as_large_as_the_file_is_refused(saved, value, hint, at_most_3_gib):
    entries = entries_of(saved)
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": ""}
    torch.save(entries | {"ema": {"x": value}} | head, saved)
    if "network" in hint:
        save_entries(saved, entries | {"ema": {"x": value}})
    with pytest.raises(InputError, match=hint):
        load_checkpoint(saved)


def rewritten(path, pickled=None, compression=zipfile.ZIP_STORED):
    """Writes the archive anew, with another pickle or compressed."""
    buffer = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w", compression) as after:
        for name in before.namelist():
            own = pickled if name.endswith("data.pkl") else None
            after.writestr(name, before.read(name) if own is None else own)


def test_memory_that_only_a_pickle_asks_for_is_not_taken(saved, at_most_3_gib):
    """bytearray(2**30), which torch.load would call; and an archive that grows when read."""
    rewritten(saved, b"\x80\x02cbuiltins\nbytearray\n(J" + (2**30).to_bytes(4, "little") + b"tR.")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(saved)
    save_entries(saved, {"x": torch.zeros(2**28)})
    rewritten(saved, compression=zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 2**21
    reset_peak_memory()
    before = peak_memory()
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(saved)
    assert peak_memory() - before < 2**28


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("num_steps", [1, 8])
def test_a_student_of_version_1_has_the_uniform_grid(tmp_path, num_steps, name):
    """Its file has the step count alone; no other number is taken."""
    path = tmp_path / name
    student = checkpoint(kind="student", stage=1, grid=GRID, sampler="ddim", ema=None)
    save_checkpoint(tmp_path / "now.pt", student)
    entries = entries_of(tmp_path / "now.pt")
    entries = {k: v for k, v in entries.items() if k not in ("grid", "sampler", "walker")}

    def save(value):
        content = entries | {"num_steps": value}
        if name == "a.safetensors":
            content = {k: v for k, v in content.items() if k not in NOT_PUBLISHED or k == "model"}
        head = {"format": FORMAT, "format_version": 1, "digest": digest(content)}
        if name == "a.pt":
            torch.save(content | head, path)
        else:
            model = content.pop("model")
            header = {key: json.dumps(entry) for key, entry in (content | head).items()}
            safetensors.torch.save_file(model, path, header)

    save(num_steps)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.levels(), uniform_grid(COSINE, num_steps))
    assert (loaded.sampler, loaded.num_steps) == ("ddim", num_steps)
    for wrong in (0, -4, 2**62, True, 8.0, [8]):
        save(wrong)
        with pytest.raises(InputError, match="num_steps: not a whole number from 1 to 1048576"):
            load_checkpoint(path)
