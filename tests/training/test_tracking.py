"""--track: the curves of TensorBoard in a tracker too, continued, and never in a training's way."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

import distill
import train
from pipeline.config import make_config
from pipeline.data import MemoryDataset, open_dataset
from tests.commands import run, write_config
from tests.toys import tiny
from training.metrics import read_metrics
from training.stage import base_stage
from training.stages import train_stage
from training.starts import Run, base_start
from training.tracking import Tracker, read_or_make_id
from utils.processes import World

ROOT = Path(__file__).parents[2]

# Writes down what it is told; BREAKS is the name of what fails.
FAKE = """
import json, os

def note(what, **details):
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps({"what": what, **details}) + "\\n")
    if os.environ.get("BREAKS") == what:
        raise RuntimeError("no\\nnetwork")

note("import")

class Run:
    def __init__(self, name):
        self.name = name

    def log(self, values, step):
        note("log", run=self.name, step=step, values=values)

    def finish(self):
        note("finish", run=self.name)

def init(**settings):
    note("init", **settings)
    return Run(settings["name"])
"""


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("evaluation.curves.draw_loss_curve", lambda folder: None)
    monkeypatch.setattr("pipeline.build.open_dataset", cache(open_dataset))


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, tmp_path, monkeypatch):
    """A fake package of that name; what it was told is in noted(tmp_path)."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{request.param}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("NOTED", str(tmp_path / "noted.jsonl"))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


def noted(folder, what):
    path = folder / "noted.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry for entry in entries if entry.pop("what") == what]


# For what is the same with all of them.
of_any_tracker = pytest.mark.parametrize("tracker", ["wandb"], indirect=True)


def curves(folder):
    """{(curve, update): value} of a stage's TensorBoard files."""
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {(k, e.step): e.value for k in events.Tags()["scalars"] for e in events.Scalars(k)}


def tracked(folder, name):
    """The same, of a run of the tracker."""
    entries = [entry for entry in noted(folder, "log") if entry["run"] == name]
    return {(k, e["step"]): v for e in entries for k, v in e["values"].items()}


def test_a_tracker_gets_the_curves_of_tensorboard(tracker, tmp_path):
    config = write_config(tmp_path)
    base, ladder = tmp_path / "base", tmp_path / "ladder"
    assert run(train, "--config_path", config, "--output", base, "--track", tracker) == 0
    teacher = base / "diffusion-4.pt"
    given = ("--teacher_model_checkpoint", teacher, "--output", ladder, "--track", tracker)
    assert run(distill, *given) == 0

    inits = noted(tmp_path, "init")
    ids = [json.loads((folder / "tracking.json").read_text())["id"] for folder in (base, ladder)]
    names = [f"{ids[0]}-stage-0", f"{ids[1]}-stage-1", f"{ids[1]}-stage-2"]
    assert [settings["name"] for settings in inits] == names
    assert ids[0].startswith("tiny-")
    assert ids[0] != ids[1]
    assert [settings["config"]["training"]["updates"] for settings in inits] == [4, 4, 4]
    assert all(settings["resume"] == "allow" for settings in inits)
    if tracker == "wandb":
        assert [settings["id"] for settings in inits] == names
    assert [entry["run"] for entry in noted(tmp_path, "finish")] == names

    for name, stage in zip(names, (0, 1, 2), strict=True):
        folder = (ladder if stage else base) / "tensorboard" / f"stage-{stage}"
        shown = curves(folder)
        assert {key for key, _ in shown} > {"loss", "gradient_norm", "learning_rate"}
        assert tracked(tmp_path, name) == pytest.approx(shown, rel=1e-6)


@of_any_tracker
def test_nothing_is_imported_or_kept_unless_asked_for(tracker, tmp_path):
    config = write_config(tmp_path, training={"updates": 1})
    assert run(train, "--config_path", config, "--output", tmp_path / "base") == 0
    assert noted(tmp_path, "import") == []
    assert not (tmp_path / "base" / "tracking.json").exists()


@of_any_tracker
def test_a_resumed_run_goes_on_in_the_same_tracked_run(tracker, tmp_path):
    """It sends no value twice; --restart begins another tracked run; a finished run sends none."""
    constant = {"learning_rate_decay": "none"}
    base = tmp_path / "base"
    for updates in (2, 4, 4):
        config = write_config(tmp_path, training={"updates": updates, **constant})
        assert run(train, "--config_path", config, "--output", base, "--track", tracker) == 0
    first, again = noted(tmp_path, "init")
    assert again["name"] == first["name"]
    losses = [entry["step"] for entry in noted(tmp_path, "log") if "loss" in entry["values"]]
    assert losses == [1, 2, 3, 4]
    given = ("--config_path", config, "--output", base, "--track", tracker, "--restart")
    assert run(train, *given) == 0
    assert noted(tmp_path, "init")[-1]["name"] != first["name"]


@of_any_tracker
@pytest.mark.parametrize("what", ["import", "init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(tracker, tmp_path, capsys, monkeypatch, what):
    monkeypatch.setenv("BREAKS", what)
    config, base = write_config(tmp_path), tmp_path / "base"
    assert run(train, "--config_path", config, "--output", base, "--track", tracker) == 0
    warnings = re.findall("warning: .*", capsys.readouterr().err)  # the bar may be on the line
    assert warnings == [f"warning: --track {tracker}: no network; the run goes on without it"]
    assert len(noted(tmp_path, what)) == 1
    updates = [entry["update"] for entry in read_metrics(base / "metrics.jsonl") if "loss" in entry]
    assert updates == [1, 2, 3, 4]
    assert (base / "diffusion-4.pt").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "a folder of that name"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, name, folder):
    paths = [path for path in sys.path if not (Path(path) / name / "__init__.py").exists()]
    if folder:  # wandb makes one where it runs
        (tmp_path / name).mkdir()
        paths.insert(0, str(tmp_path))
    monkeypatch.setattr(sys, "path", paths)
    config = write_config(tmp_path)
    given = ("--config_path", config, "--output", tmp_path / "base", "--track", name)
    assert run(train, *given) == 2
    expected = f"error: --track {name}: not installed; pip install {name}\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "base").exists()


def test_an_unknown_tracker_is_one_line(tmp_path, capsys):
    given = ("--teacher_model_checkpoint", tmp_path / "x.pt", "--track", "tensorboard")
    assert run(distill, *given) == 2
    assert capsys.readouterr().err == "error: --track tensorboard: take trackio or wandb\n"


class Follower(World):
    """A process of a higher rank, without the others."""

    leads = False


def test_only_the_leading_process_tracks(tracker, tmp_path):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 1, 32, 32), generator=rng, dtype=torch.uint8)
    dataset = MemoryDataset(images, torch.arange(32) % 10, 10)
    config = make_config(tiny(), "x")
    for kind, calls in ((Follower, 0), (World, 1)):
        folder = tmp_path / kind.__name__
        sender = Tracker(tracker, folder, "x", {})
        run = Run(config, "x", folder, kind(torch.device("cpu")), dataset, sender)
        train_stage(run, replace(base_stage(config), updates=1), base_start(run))
        assert len(noted(tmp_path, "init")) == calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 3}', '{"id": "a/b"}', "[" * 100_000])
def test_an_id_that_cannot_be_read_is_made_anew(tmp_path, content):
    (tmp_path / "tracking.json").write_text(content)
    made = read_or_make_id(tmp_path, "my config: ä/b")
    assert made.startswith("my-config-b-")
    assert read_or_make_id(tmp_path, "another") == made


def test_trackio_keeps_the_curves_on_this_machine(tmp_path, monkeypatch):
    """The real package, without a network, in two processes of which the second goes on."""
    pytest.importorskip("trackio", reason="trackio is not installed (pip install trackio)")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "OMP_NUM_THREADS": "1",
    }
    base = tmp_path / "base"
    for updates in (2, 4):
        config = write_config(
            tmp_path, training={"updates": updates, "learning_rate_decay": "none"}
        )
        command = [sys.executable, "train.py", "--config_path", config, "--output", base]
        command += ["--track", "trackio"]
        subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True)
    with sqlite3.connect(tmp_path / "trackio" / "progressive-distillation.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    name = json.loads((base / "tracking.json").read_text())["id"]
    assert {row[0] for row in rows} == {f"{name}-stage-0"}
    sent = [(key, step, value) for _, step, line in rows for key, value in json.loads(line).items()]
    shown = curves(base / "tensorboard" / "stage-0")
    assert sorted((key, step) for key, step, _ in sent) == sorted(shown), "each once"
    for key, step, value in sent:
        assert value == pytest.approx(shown[key, step], rel=1e-6)
