"""Two processes of torchrun, gloo between them, against one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from evaluation.gallery import CHUNK
from pipeline.checkpoint import digest, load_checkpoint
from tests.processes import (
    fewer_real_images,
    require_same_metrics,
    require_same_training,
    run_together,
)
from tests.toys import tiny
from training.metrics import read_metrics
from utils.command import InputError
from utils.processes import join_world, take_all_threads

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _nothing_outlives_the_tests():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()


STARTED = []


def begin(processes, *arguments, options=("--standalone",)):
    """Starts a script, under torchrun if there is to be more than one process."""
    launcher = ["-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    distributed = processes > 1 or "--standalone" not in options
    process = subprocess.Popen(
        [sys.executable, *(launcher if distributed else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def end(process):
    """What the process said, which ends well."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training and ladder by one process and by two."""
    folder = tmp_path_factory.mktemp("distributed")
    config = folder / "tiny.yaml"
    values = tiny(model={"dropout": 0.0}, data={"horizontal_flip": True})
    config.write_text(yaml.safe_dump(values))
    said = {}
    for processes in (1, 2):
        base, ladder = folder / f"base-{processes}", folder / f"ladder-{processes}"
        train = ("--config_path", config, "--output", base)
        run_together(1, "train", *train) if processes == 1 else end(begin(2, "train.py", *train))
        distill = ("--teacher_model_checkpoint", base / "diffusion-4.pt", "--output", ladder)
        said[processes] = run_together(processes, "distill", *distill)
    return folder, said


@pytest.mark.parametrize(
    ("file", "began_as"),
    [
        ("base-{}/diffusion-4.pt", "base-{}/diffusion-2.pt"),
        ("ladder-{}/student-2.pt", "ladder-{}/student-4.pt"),
    ],
)
def test_two_processes_train_what_one_trains(runs, file, began_as):
    folder, _ = runs
    before, one = (load_checkpoint(folder / name.format(1)) for name in (began_as, file))
    require_same_training(before, one, load_checkpoint(folder / file.format(2)))


def test_the_metrics_are_those_of_the_global_batch(runs):
    folder, _ = runs
    for name in ("base", "ladder"):
        require_same_metrics(folder / f"{name}-1", folder / f"{name}-2")
        for line in read_metrics(folder / f"{name}-1" / "metrics.jsonl"):
            has = any(key.startswith("loss_logsnr_") for key in line)
            assert has or "loss" not in line or line["update"] % 2, "each checkpoint has them"


def test_each_process_may_accumulate(runs, tmp_path):
    folder, _ = runs
    settings = ("--set", "training.accumulate=2")
    run_together(2, "train", "--config_path", folder / "tiny.yaml", "--output", tmp_path, *settings)
    require_same_metrics(folder / "base-1", tmp_path)
    files = [folder / "base-1" / f"diffusion-{n}.pt" for n in (2, 4)]
    require_same_training(*map(load_checkpoint, (*files, tmp_path / "diffusion-4.pt")))


def test_only_the_first_process_speaks_and_writes(runs):
    folder, said = runs
    assert said[2].count("distilled to 2 steps") == said[1].count("distilled to 2 steps") == 1
    for name in ("base", "ladder"):
        names = [sorted(p.name for p in (folder / f"{name}-{n}").iterdir()) for n in (1, 2)]
        assert names[0] == names[1]


def test_two_processes_share_the_images(runs, tmp_path):
    folder, _ = runs
    for processes in (1, 2):
        checkpoint = ("--checkpoint", folder / "base-1" / "diffusion-4.pt", "--steps", 2)
        images = ("--count", 7, "--batch_size", 2, "--output", tmp_path / f"{processes}.npz")
        run_together(processes, "sample", *checkpoint, *images)
    one, two = (np.load(tmp_path / f"{n}.npz")["arr_0"].astype(int) for n in (1, 2))
    assert one.shape == two.shape == (7, 32, 32, 1)
    assert np.abs(one - two).max() <= 1


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    folder, _ = runs
    out = tmp_path / "base"
    out.mkdir()
    half = folder / "base-1" / "diffusion-2.pt"
    (out / half.name).write_bytes(half.read_bytes())
    said = run_together(2, "train", "--config_path", folder / "tiny.yaml", "--output", out)
    assert "going on from" in said
    one, two = (load_checkpoint(f / "diffusion-4.pt") for f in (folder / "base-1", out))
    for key, value in one.model.items():
        torch.testing.assert_close(two.model[key], value, rtol=1e-3, atol=2e-4)


def workers_of(process):
    """The processes that torchrun has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def same_weights(a, b):
    one, two = load_checkpoint(a), load_checkpoint(b)
    return all(digest(getattr(one, n)) == digest(getattr(two, n)) for n in ("model", "optimizer"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_restarted_and_the_run_goes_on(runs, tmp_path):
    folder, _ = runs
    more = ("--set", "training.updates=200", "training.checkpoint_every=20")
    train = ("--config_path", folder / "tiny.yaml", *more, "--output")
    run_together(2, "train", *train, tmp_path / "undisturbed")
    options = ("--standalone", "--max-restarts=1")
    process = begin(2, "train.py", *train, tmp_path / "killed", options=options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "diffusion-20.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert "going on from" in end(process)
    last = [tmp_path / run / "diffusion-200.pt" for run in ("undisturbed", "killed")]
    assert same_weights(*last), "bit-identical: as many processes, on the same machine"


def test_two_machines_meet_by_c10d(runs, tmp_path):
    """Two agents, as torchrun has them on two machines, of one process each."""
    folder, _ = runs
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=two")
    train = ("train.py", "--config_path", folder / "tiny.yaml", "--output", tmp_path)
    agents = [begin(1, *train, options=options) for _ in range(2)]
    said = [end(agent) for agent in agents]
    assert "".join(said).count("trained:") == 1
    assert same_weights(tmp_path / "diffusion-4.pt", folder / "base-2" / "diffusion-4.pt")


def test_a_damaged_checkpoint_is_set_aside_for_all_processes(runs, tmp_path):
    """What rank 0 finds, by its name, is what the others read."""
    folder, _ = runs
    out = tmp_path / "base"
    out.mkdir()
    for name in ("diffusion-2.pt", "diffusion-4.pt"):
        (out / name).write_bytes((folder / "base-2" / name).read_bytes())
    (out / "diffusion-4.pt").write_bytes(b"nothing")
    said = run_together(2, "train", "--config_path", folder / "tiny.yaml", "--output", out)
    assert "going on from" in said
    assert (out / "diffusion-4.pt.damaged").exists()
    assert same_weights(out / "diffusion-4.pt", folder / "base-2" / "diffusion-4.pt")


def test_restarts_with_a_shared_store_are_warned_of(monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    around = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in around.items():
        monkeypatch.setenv(name, str(value))
    with join_world("cpu") as world:
        assert world.agree_on("a text") == "a text"
    assert not capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: 1 / 0)
    with pytest.raises(ZeroDivisionError), join_world("cpu"):
        pass
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("kind", "name", "around", "index"),
    [
        ("cuda", None, {}, 0),
        ("cuda", "cuda", {}, 0),
        ("cuda", "cuda:1", {}, 1),
        ("cuda", None, {**SECOND_OF_TWO, "LOCAL_RANK": "1"}, 1),
        ("xpu", None, {**SECOND_OF_TWO, "LOCAL_RANK": "1"}, 1),
        ("mps", None, {}, 0),
    ],
)
def test_a_gpu_is_known_by_its_index(monkeypatch, kind, name, around, index):
    """set_device_index and DistributedDataParallel refuse a GPU without one."""
    for key, value in around.items():
        monkeypatch.setenv(key, value)
    taken = []
    backends = []
    pretend_accelerator(monkeypatch, kind)
    monkeypatch.setattr("torch.accelerator.set_device_index", taken.append)
    monkeypatch.setattr("torch.distributed.init_process_group", backends.append)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with join_world(name) as world:
        assert world.device == torch.device(kind, index)
        assert world.device.index == index
    assert taken == [index]
    assert backends == ([{"cuda": "nccl", "xpu": "xccl"}[kind]] if around else [])


def pretend_accelerator(monkeypatch, kind):
    monkeypatch.setattr(
        "torch.accelerator.current_accelerator", lambda check_available: torch.device(kind)
    )
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: None)
    monkeypatch.setattr("torch.empty", lambda size, device: None)


@pytest.mark.parametrize(
    ("kind", "name", "around", "hint"),
    [
        ("mps", None, SECOND_OF_TWO, "--device mps: several processes cannot work on it"),
        (
            "cuda",
            "cuda:0",
            {**SECOND_OF_TWO, "LOCAL_WORLD_SIZE": "2"},
            "give --device cuda, and each",
        ),
        ("mps", "cuda", {}, "--device cuda: not a device of this machine; take cpu or mps"),
        ("cuda", "meta", {}, "--device meta: not a device of this machine; take cpu or cuda"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(monkeypatch, kind, name, around, hint):
    for key, value in around.items():
        monkeypatch.setenv(key, value)
    pretend_accelerator(monkeypatch, kind)
    with pytest.raises(InputError, match=hint), join_world(name):
        pass


def test_a_full_device_is_not_called_a_missing_one(monkeypatch):
    pretend_accelerator(monkeypatch, "cuda")

    def full(size, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.empty", full)
    with pytest.raises(InputError, match="--device cuda: its memory is full"), join_world(None):
        pass


def test_two_processes_share_an_evaluation(runs, tmp_path):
    folder, _ = runs
    checkpoint = ("--checkpoint", folder / "base-1" / "diffusion-4.pt", "--steps", 1)
    command = (*checkpoint, "--count", 500, "--output", tmp_path)
    said = run_together(2, "evaluate", *command, before=fewer_real_images)
    assert said.count("written:") == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["floor", "images", "base"]
    assert len(list(tmp_path.glob("images/*/*.safetensors"))) == 500 // CHUNK


def test_what_one_process_does_alone_has_the_threads_of_all(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for processes, threads in (("2", 6), ("", 3)):
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        take_all_threads()
        assert asked == [threads]
