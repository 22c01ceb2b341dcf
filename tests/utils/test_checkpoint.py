import errno
import pickle
import random

import pytest
import torch

from tests.toys import tiny
from utils.build import build_network, load_weights
from utils.checkpoint import (
    Checkpoint,
    digest,
    load_checkpoint,
    publish_checkpoint,
    save_checkpoint,
)
from utils.command import DamagedCheckpoint, InputError
from utils.config import make_config
from utils.files import atomic_write
from utils.runs import newest_whole


def checkpoint(**changes):
    config = make_config(tiny(), "tiny")
    network = build_network(config, torch.device("cpu"))
    values = {
        "kind": "base",
        "name": "tiny",
        "config": config,
        "update": 3,
        "stage": 0,
        "num_steps": None,
        "model": network.state_dict(),
        "ema": {k: v + 1 for k, v in network.state_dict().items()},
    }
    return Checkpoint(**values | changes)


def test_a_checkpoint_reads_as_it_was_written(tmp_path):
    path = tmp_path / "a.pt"
    before = checkpoint(num_steps=8, kind="student", lineage={"teacher": "x"})
    save_checkpoint(path, before)
    after = load_checkpoint(path)
    for field in ("kind", "name", "config", "update", "stage", "num_steps", "lineage"):
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
    from pathlib import Path

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
    with pytest.raises(InputError, match="format version 0; this code reads 1"):
        load_checkpoint(path)
    head = {"format": "progressive-distillation", "format_version": 1}
    torch.save(head, path)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    content = {"config": {}, "update": 3}
    torch.save(content | head | {"digest": digest(content)}, path)
    with pytest.raises(InputError, match="missing or unknown entries"):
        load_checkpoint(path)
    for content in ({"config": "abc"}, {"config": {}, "model": 3, "update": 1}):
        torch.save(content | head | {"digest": digest(content)}, path)
        with pytest.raises(InputError, match="missing or unknown entries"):
            load_checkpoint(path)
    endless: list = []
    endless.append(endless)
    torch.save({"x": endless} | head | {"digest": ""}, path)
    with pytest.raises(InputError, match="damaged"):
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
    monkeypatch.setattr("utils.checkpoint.torch.load", fail)
    with pytest.raises(InputError, match=hint) as raised:
        newest_whole([path])
    assert not isinstance(raised.value, DamagedCheckpoint)
    assert path.exists()
