"""The scripts as their users run them: results, resuming, warnings, and every error in one line."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import evaluate
import sample
import train
from pipeline.build import build_network
from pipeline.checkpoint import digest, load_checkpoint, save_checkpoint
from pipeline.config import make_config, override
from pipeline.engine import asked_engine, sampling_engine
from tests.commands import refused, run, write_config
from training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def trained(folder):
    """A trained base model and its two-stage ladder, made through the command line."""
    config = write_config(folder)
    base, ladder = folder / "base", folder / "ladder"
    assert run(train, "--config_path", config, "--output", base) == 0
    teacher = base / "diffusion-4.pt"
    common = ("--config_path", config, "--teacher_model_checkpoint", teacher)
    assert run(distill, *common, "--output", ladder) == 0
    return {"config": config, "base": base, "ladder": ladder, "teacher": teacher}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("workshop"))


# --- the main job ---------------------------------------------------------------------------


def test_training_writes_checkpoints_grids_and_metrics(workshop):
    names = sorted(p.name for p in workshop["base"].iterdir())
    assert names == [
        "diffusion-2.png",
        "diffusion-2.pt",
        "diffusion-4.png",
        "diffusion-4.pt",
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
    ]
    checkpoint = load_checkpoint(workshop["teacher"])
    assert (checkpoint.kind, checkpoint.update, checkpoint.num_steps) == ("base", 4, None)
    assert checkpoint.ema is not None
    lines = (workshop["base"] / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    updates = [e for e in entries if "loss" in e]
    assert [e["update"] for e in updates] == [1, 2, 3, 4]
    assert {"gradient_norm", "learning_rate", "images_per_second"} <= updates[0].keys()
    assert any(key.startswith("loss_logsnr_") for key in updates[1])
    samples = [e for e in entries if "samples_mean" in e]
    assert [e["update"] for e in samples] == [2, 4]
    assert {"samples_variance", "samples_clipped"} <= samples[0].keys()
    assert Image.open(workshop["base"] / "diffusion-4.png").size == (2 * (3 * 34 - 2),) * 2


def test_a_two_stage_ladder(workshop):
    names = {p.name for p in workshop["ladder"].iterdir()}
    assert names == {
        *(f"student-{n}.{suffix}" for n in (4, 2) for suffix in ("pt", "png")),
        *("ladder.md", "ladder.json", "ladder.png", "comparison.png"),
        *("metrics.jsonl", "images", "tensorboard", "loss.png"),
    }
    base = load_checkpoint(workshop["teacher"])
    first, second = (load_checkpoint(workshop["ladder"] / f"student-{n}.pt") for n in (4, 2))
    assert [first.num_steps, second.num_steps] == [4, 2]
    assert [first.stage, second.stage] == [1, 2]
    assert first.lineage["teacher"] == digest(base.ema)
    assert second.lineage["teacher"] == digest(first.model)
    assert first.ema is None
    assert digest(first.model) != digest(base.ema)
    numbers = json.loads((workshop["ladder"] / "ladder.json").read_text())
    assert numbers["reference_steps"] == 8
    assert [row["num_steps"] for row in numbers["rows"]] == [4, 2]
    assert all(row["teacher_error"] > 0 for row in numbers["rows"])
    table = (workshop["ladder"] / "ladder.md").read_text()
    assert f"| 4 | 3 | {numbers['rows'][0]['student_error']:.6f} |" in table


def test_running_again_does_nothing_twice(workshop, tmp_path, capsys):
    base, ladder = (shutil.copytree(workshop[k], tmp_path / k) for k in ("base", "ladder"))
    before = {p: p.stat().st_mtime_ns for p in [*base.glob("*.pt"), *ladder.glob("*.pt")]}
    assert run(train, "--config_path", workshop["config"], "--output", base) == 0
    common = ("--config_path", workshop["config"], "--teacher_model_checkpoint")
    assert run(distill, *common, workshop["teacher"], "--output", ladder) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "next: python distill.py" in capsys.readouterr().out


def test_a_resumed_run_ends_bit_identical(workshop, tmp_path):
    base, ladder = tmp_path / "base", tmp_path / "ladder"
    base.mkdir()
    shutil.copy(workshop["base"] / "diffusion-2.pt", base)
    assert run(train, "--config_path", workshop["config"], "--output", base) == 0
    whole = torch.load(workshop["teacher"], weights_only=True)
    resumed = torch.load(base / "diffusion-4.pt", weights_only=True)
    for part in ("model", "ema", "optimizer"):
        assert digest(whole[part]) == digest(resumed[part])

    shutil.copytree(workshop["ladder"], ladder)
    (ladder / "student-2.pt").unlink()
    common = ("--config_path", workshop["config"], "--teacher_model_checkpoint")
    assert run(distill, *common, workshop["teacher"], "--output", ladder) == 0
    again, once = (load_checkpoint(f / "student-2.pt") for f in (ladder, workshop["ladder"]))
    assert digest(again.model) == digest(once.model)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(workshop, tmp_path, capsys):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    newest = base / "diffusion-4.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(train, "--config_path", workshop["config"], "--output", base) == 0
    said = capsys.readouterr()
    assert "set aside as diffusion-4.pt.damaged; taking the one before it" in said.err
    assert (base / "diffusion-4.pt.damaged").stat().st_size == 1000
    assert "going on from" in said.out
    assert digest(load_checkpoint(newest).model) == digest(
        load_checkpoint(workshop["teacher"]).model
    )


def test_another_config_in_the_same_folder_is_refused_with_its_keys(workshop, tmp_path, capsys):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    common = ("--config_path", workshop["config"], "--output", base)
    message = refused(capsys, train, *common, "--set", "training.batch_size=4", "seed=2")
    assert "another seed, training.batch_size" in message
    assert "--restart" in message
    assert run(train, *common, "--set", "training.batch_size=4", "--restart") == 0
    assert load_checkpoint(base / "diffusion-4.pt").config.training.batch_size == 4


def test_a_finished_run_can_go_on_for_longer_but_not_shorter(workshop, tmp_path, capsys):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    common = ("--config_path", workshop["config"], "--output", base, "--set")
    assert "training.updates" in refused(capsys, train, *common, "training.updates=3")
    assert run(train, *common, "training.updates=6", "training.checkpoint_every=1") == 0
    assert "going on from" in capsys.readouterr().out
    assert load_checkpoint(base / "diffusion-6.pt").update == 6
    falling = "training.learning_rate_decay=linear"
    message = refused(capsys, train, *common, "training.updates=8", falling)
    assert "training.updates, training.learning_rate_decay" in message


def test_restart_deletes_what_the_run_wrote_and_nothing_else(workshop, tmp_path, capsys):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    (base / "diffusion-best.pt").write_text("mine")
    (base / ".diffusion-2.pt.123.tmp").write_text("half of a file")
    common = ("--config_path", workshop["config"], "--output", base, "--restart", "--set")
    message = refused(capsys, train, *common, "training.accumulate=20")
    assert "training: accumulate: 20 parts of a batch_size of 8" in message
    assert (base / "diffusion-4.pt").exists(), "refused before anything was deleted"
    assert run(train, *common, "training.updates=1") == 0
    names = {p.name for p in base.iterdir()}
    assert {"diffusion-best.pt", "diffusion-1.pt"} <= names
    assert not {"diffusion-4.pt", "diffusion-4.png", ".diffusion-2.pt.123.tmp"} & names


def test_a_folder_where_another_run_writes_is_left_alone(workshop, tmp_path, capsys):
    hold = (
        "import sys; from pathlib import Path; from training.folder import kept_to_itself\n"
        f"with kept_to_itself(Path({str(tmp_path)!r})) as alone:\n"
        "    print(alone, flush=True); sys.stdin.read()"
    )
    given = ("--config_path", workshop["config"], "--output", tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdout.readline() == b"True\n"
    model = ("--checkpoint", workshop["base"] / "diffusion-4.pt", "--count", 20, "--steps", 1)
    line = refused(capsys, evaluate, *model, "--output", tmp_path)
    assert "another run is writing there" in line
    (tmp_path / ".diffusion-2.pt.123.tmp").write_text("being written")
    assert "another run is writing there" in refused(capsys, train, *given, "--restart")
    assert (tmp_path / ".diffusion-2.pt.123.tmp").exists()
    other.kill()
    other.wait()
    assert run(train, *given) == 0, "a kill leaves no lock behind"
    assert not (tmp_path / ".lock").exists()


def test_a_run_of_several_machines_is_not_restarted(workshop, tmp_path, capsys, monkeypatch):
    """A machine that joins later starts the processes again, and --restart would delete the run."""
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    given = ("--config_path", workshop["config"], "--output", base, "--restart")
    assert "--restart: not on several machines" in refused(capsys, train, *given)
    assert (base / "diffusion-4.pt").exists()


def test_a_ladder_never_lands_on_its_teacher(workshop, capsys):
    student = workshop["ladder"] / "student-2.pt"
    common = ("--teacher_model_checkpoint", student, "--output", workshop["ladder"])
    steps = ("--initial_sampling_steps", 1, "--distillation_iterations", 1)
    for restart in ((), ("--restart",)):
        assert "give another folder" in refused(capsys, distill, *common, *steps, *restart)
    assert student.exists()


def test_a_checkpoint_of_another_version_is_not_overwritten(workshop, tmp_path, capsys):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    newest = base / "diffusion-4.pt"
    content = torch.load(newest, weights_only=True) | {"format_version": 3}
    torch.save(content, newest)
    common = ("--config_path", workshop["config"], "--output", base)
    assert "format version 3; this code reads 1 and 2" in refused(capsys, train, *common)
    shutil.copy(workshop["ladder"] / "student-4.pt", newest)
    assert "not a base model in training" in refused(capsys, train, *common)


def test_the_ladder_goes_on_from_a_student(workshop, tmp_path, capsys):
    student = workshop["ladder"] / "student-4.pt"
    common = ("--teacher_model_checkpoint", student, "--output", tmp_path)
    message = refused(capsys, distill, *common)  # its config's first_steps is 4
    assert "makes 4 steps, so its student cannot make 4" in message
    assert "take 2" in message
    steps = ("--initial_sampling_steps", 2, "--distillation_iterations", 2)
    assert run(distill, *common, *steps, "--set", "distillation.updates_per_stage=1") == 0
    assert load_checkpoint(tmp_path / "student-1.pt").stage == 3
    assert json.loads((tmp_path / "ladder.json").read_text())["reference_steps"] == 4


def test_the_checkpoints_network_holds_and_the_yaml_is_warned_of(workshop, tmp_path, capsys):
    config = write_config(
        tmp_path, model={"channels": 16}, distillation={"updates_per_stage": 1}, seed=5
    )
    common = ("--config_path", config, "--teacher_model_checkpoint", workshop["teacher"])
    assert run(distill, *common, "--output", tmp_path / "out") == 0
    assert run(distill, *common, "--output", tmp_path / "out", "--set", "training.updates=9") == 0
    assert "training.updates" in capsys.readouterr().err
    assert run(distill, *common, "--output", tmp_path / "out") == 0
    warnings = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning")]
    assert len(warnings) == 1
    assert "seed, model.channels differ" in warnings[0]
    student = load_checkpoint(tmp_path / "out" / "student-2.pt")
    assert (student.config.model.channels, student.update) == (8, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_channels_and_flips_by_config_alone(tmp_path, channels):
    config = write_config(
        tmp_path,
        data={"channels": channels, "horizontal_flip": True},
        model={"num_classes": 10},
        diffusion={"prediction": "both"},
        training={"updates": 1, "learning_rate_decay": "linear"},
        distillation={"updates_per_stage": 1, "iterations": 1},
        sampling={"steps": 2, "sampler": "ancestral:medium:0.5", "clip": False},
    )
    assert run(train, "--config_path", config, "--output", tmp_path) == 0
    teacher = tmp_path / "diffusion-1.pt"
    assert run(distill, "--teacher_model_checkpoint", teacher, "--output", tmp_path / "d") == 0
    npz = tmp_path / "x.npz"
    student = tmp_path / "d" / "student-4.pt"
    labelled = ("--checkpoint", student, "--count", 3, "--output", npz, "--labels=-1,0")
    assert run(sample, *labelled) == 0
    assert np.load(npz)["arr_0"].shape == (3, 32, 32, channels)


def test_guidance_and_a_row_for_each_class(workshop, tmp_path, capsys):
    teacher = tmp_path / "teacher.pt"
    stored = load_checkpoint(workshop["teacher"])
    values = stored.config.model_dump(mode="json")
    values["model"]["num_classes"], values["training"]["label_dropout"] = 3, 0.3
    conditional = make_config(values, "x")
    network = build_network(conditional, torch.device("cpu"))
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    weights = network.state_dict()
    save_checkpoint(teacher, replace(stored, config=conditional, model=weights, ema=None))
    pictures = {}
    for guidance in ("0", "2.5"):
        out = tmp_path / f"{guidance}.png"
        asked = ("--checkpoint", teacher, "--guidance", guidance, "--output", out)
        assert run(sample, *asked) == 0
        with Image.open(out) as picture:
            pictures[guidance] = np.asarray(picture)
            assert picture.size == (2 * (3 * 34 - 2), 2 * (3 * 34 - 2)), "3 rows of 9 / 3 images"
    assert (pictures["0"] != pictures["2.5"]).any()
    grid = run(sample, "--checkpoint", teacher, "--count", 9, "--output", tmp_path / "x.npz")
    images = np.load(tmp_path / "x.npz")["arr_0"][..., 0]
    assert grid == 0
    assert (pictures["0"][0:64:2, 68:132:2] == images[3]).all(), "the second of class 0"
    assert "--guidance 2.0: this checkpoint knows no classes" in refused(
        capsys, sample, "--checkpoint", workshop["teacher"], "--guidance", "2"
    )
    assert "from 0 to 1000" in refused(capsys, sample, "--checkpoint", teacher, "--guidance", "nan")


def test_an_image_folder_trains(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 36, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for n, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{n}.jpg")
    data = {"name": "image_folder", "root": str(tmp_path / "images"), "channels": 3, "workers": 1}
    config = write_config(tmp_path, data=data)
    assert run(train, "--config_path", config, "--output", tmp_path / "out") == 0
    (tmp_path / "images" / "0.jpg").write_bytes(b"no")
    assert run(train, "--config_path", config, "--output", tmp_path / "other") == 2


# --- sampling -------------------------------------------------------------------------------


def test_a_grid_has_the_checkpoints_steps(workshop, tmp_path, capsys):
    path = tmp_path / "grid.png"
    student = workshop["ladder"] / "student-4.pt"
    assert run(sample, "--checkpoint", student, "--output", path, "--trajectory") == 0
    said = capsys.readouterr()
    assert "4 steps of ddim" in said.out
    assert "warning" not in said.err
    assert Image.open(path).size == (200, 200)
    assert Image.open(tmp_path / "grid.gif").n_frames == 5
    strip = Image.open(tmp_path / "grid-strip.png")
    assert strip.size == (2 * (5 * 34 - 2), 2 * (12 * 34 - 2))
    grid, steps = (np.asarray(image)[::2, ::2].astype(int) for image in (Image.open(path), strip))
    assert np.array_equal(steps[:32, 4 * 34 :], grid[:32, :32]), "the last column is the image"
    with Image.open(tmp_path / "grid.gif") as gif:
        first = np.asarray(gif.convert("L"))[::2, ::2].astype(int)
        gif.seek(4)
        last = np.asarray(gif.convert("L"))[::2, ::2].astype(int)
    assert np.abs(first[:32, :32] - steps[:32, :32]).max() <= 2, "z above, where the GIF begins"
    assert np.abs(last - grid).max() <= 2


def test_an_image_is_a_function_of_seed_and_index(workshop, tmp_path):
    common = ("--checkpoint", workshop["teacher"], "--sampler", "ancestral", "--steps", 3)
    paths = [tmp_path / f"{n}.npz" for n in range(3)]
    for path, batch_size, seed in zip(paths, (2, 5, 5), (1, 1, 2), strict=True):
        batches = ("--count", 5, "--batch_size", batch_size, "--seed", seed)
        assert run(sample, *common, *batches, "--output", path) == 0
    a, b, c = (np.load(path)["arr_0"] for path in paths)
    assert a.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= 1  # sums in another order, rounded
    assert np.abs(a.astype(int) - c).max() > 1


def test_a_folder_holds_the_images_of_the_npz(workshop, tmp_path, capsys):
    common = ("--checkpoint", workshop["teacher"], "--count", 3, "--steps", 2, "--no-clip")
    assert run(sample, *common, "--output", tmp_path / "images") == 0
    assert run(sample, *common, "--output", tmp_path / "a.npz") == 0
    files = sorted((tmp_path / "images").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    array = np.load(tmp_path / "a.npz")["arr_0"]
    for file, image in zip(files, array, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image[..., 0])
    assert run(sample, *common, "--output", tmp_path / "images") == 0, "the same again"
    fewer = (*common[:3], 2, "--output", tmp_path / "images")
    assert "holds 1 other pictures, 000002.png" in refused(capsys, sample, *fewer)


def test_a_checkpoint_of_a_gpu_is_sampled_eagerly_in_float32_on_a_cpu(
    workshop, tmp_path, monkeypatch
):
    stored = load_checkpoint(workshop["teacher"])
    config = override(stored.config.model_dump(mode="json"), ["engine.precision=bf16"])
    path = tmp_path / "gpu.pt"
    compiled = override(config, ["engine.compile=true"])
    save_checkpoint(path, replace(stored, config=make_config(compiled, "x")))
    monkeypatch.setattr("torch.compile", lambda network: pytest.fail("compiled"))
    images = []
    for checkpoint in (path, workshop["teacher"]):
        out = tmp_path / "x.npz"
        assert run(sample, "--checkpoint", checkpoint, "--count", 2, "--output", out) == 0
        images.append(np.load(out)["arr_0"])
    assert np.array_equal(*images)
    engine, gpu = load_checkpoint(path).config.engine, torch.device("cuda:0")
    assert engine.compile
    assert sampling_engine(engine, gpu) == engine.model_copy(update={"compile": False})
    for asked, precision, compiled in (
        ((gpu, None, False), "bf16", False),
        ((gpu, "fp32", True), "fp32", True),
        ((torch.device("cpu"), None, True), "fp32", True),
        ((torch.device("cpu"), "bf16", False), "bf16", False),
    ):
        found = asked_engine(engine, *asked)
        assert (found.precision, found.compile) == (precision, compiled)
        assert sampling_engine(found, torch.device("cpu")) == found, "asked for, so it stays"


def test_a_cpu_samples_in_another_precision_if_asked_to(workshop, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda network, dynamic: compiled.append(1) or network)
    made = {}
    for name, asked in (
        ("default", ()),
        ("fp32", ("--precision", "fp32")),
        ("bf16", ("--precision", "bf16")),
        ("compiled", ("--compile",)),
    ):
        out = tmp_path / f"{name}.npz"
        given = ("--checkpoint", workshop["teacher"], "--count", 20, "--output", out)
        assert run(sample, *given, *asked) == 0
        made[name] = np.load(out)["arr_0"].astype(int)
    assert len(compiled) == 1
    for name in ("fp32", "compiled"):
        assert np.array_equal(made[name], made["default"])
    difference = np.abs(made["bf16"] - made["default"])
    assert 0 < difference.max() < 20, "another precision, the same images"


def test_the_default_output_tells_runs_and_steps_apart(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    student = workshop["ladder"] / "student-4.pt"
    for given in (
        ("--checkpoint", workshop["teacher"]),
        ("--checkpoint", workshop["teacher"], "--steps", 3),
        ("--checkpoint", student),
    ):
        assert run(sample, *given) == 0
    run_name = load_checkpoint(student).name
    own = load_checkpoint(workshop["teacher"]).config.sampling.steps
    assert {path.stem for path in Path("output/samples").iterdir()} == {
        f"{run_name}-diffusion-4-{own}-steps",
        f"{run_name}-diffusion-4-3-steps",
        f"{run_name}-student-4",
    }


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--steps", 8), "distilled for 4 steps"),
        (("--sampler", "ancestral"), "distilled for the sampler ddim"),
    ],
)
def test_what_a_student_was_not_made_for_is_warned_of(workshop, tmp_path, capsys, arguments, hint):
    student = workshop["ladder"] / "student-4.pt"
    common = ("--checkpoint", student, "--output", tmp_path / "x.png")
    assert run(sample, *common, *arguments) == 0
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--steps", 0), "--steps 0"),
        (("--batch_size", 0), "--batch_size 0"),
        (("--count", 0), "--count 0"),
        (("--sampler", "ddpm"), "ddim, ancestral"),
        (("--labels", "1"), "knows no classes"),
        (("--output", "x.jpg"), ".png"),
        (("--count", 3, "--output", "x.png"), "a folder or a .npz"),
        (("--count", 3, "--trajectory"), "--trajectory"),
        (("--device", "tpu9"), "--device tpu9"),
        (("--device", "meta"), "--device meta"),
        (("--steps", 10**12), "--steps 1000000000000"),
        (("--count", 10**19), "--count 10000000000000000000: take a whole number from 1 to"),
        (("--count", "9" * 5000), "take a whole number"),
        (("--count", "many"), "--count many: take a whole number"),
        (("--batch_size", 10**19), "--batch_size 10000000000000000000"),
        (("--seed", 10**30), "--seed 1000000000000000000000000000000"),
        (("--count", 3, "--output", ""), "--output '': not the name"),
        (("--output", " "), "--output ' ': not the name"),
        (("--sampler",), "--sampler expected one argument"),
        (("--no-such",), "unrecognized arguments: --no-such"),
    ],
)
def test_bad_arguments_of_sample(workshop, capsys, arguments, hint):
    assert hint in refused(capsys, sample, "--checkpoint", workshop["teacher"], *arguments)


# --- errors ---------------------------------------------------------------------------------


def test_errors_name_file_and_key_and_leave_nothing(workshop, tmp_path, capsys):
    config, out = workshop["config"], tmp_path / "out"
    train_here = ("--config_path", config, "--output", out)
    message = refused(capsys, train, *train_here, "--set", "model.chanels=8")
    assert "tiny.yaml" in message
    assert "model.chanels: unknown key; did you mean channels?" in message
    missing = refused(capsys, train, "--config_path", tmp_path / "no.yaml", "--output", out)
    assert "no.yaml: no such config file" in missing
    message = refused(capsys, train, *train_here, "--set", f"data.root={tmp_path}")
    assert "train-images-idx3-ubyte.gz: missing" in message
    message = refused(capsys, train, *train_here, "--set", "model.num_classes=7")
    assert "model.num_classes: 7, but mnist has 10 classes" in message

    truncated = tmp_path / "cut.pt"
    truncated.write_bytes(workshop["teacher"].read_bytes()[:5000])
    for script, flag in ((distill, "--teacher_model_checkpoint"), (sample, "--checkpoint")):
        message = refused(capsys, script, flag, truncated, "--output", out)
        assert "cut.pt: not a checkpoint of this project, or damaged" in message
        assert "no such checkpoint" in refused(capsys, script, flag, tmp_path / "no.pt")
    assert not out.exists()


def test_step_counts_that_cannot_be_halved_are_refused_before_anything(workshop, tmp_path, capsys):
    common = ("--teacher_model_checkpoint", workshop["teacher"], "--output", tmp_path / "out")
    steps = ("--initial_sampling_steps", 12, "--distillation_iterations", 4)
    message = refused(capsys, distill, *common, *steps)
    assert "first_steps 12 cannot be halved 3 times" in message
    assert "at most 3 iterations" in message
    assert not (tmp_path / "out").exists()


def test_every_process_tells_its_own_error(tmp_path, monkeypatch, capsys):
    for rank, start_of_line in (("0", "error: "), ("1", "rank 1: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert run(train, "--config_path", tmp_path / "no.yaml") == 2
        assert capsys.readouterr().err.startswith(start_of_line)


def test_argparse_errors_are_exit_codes(capsys):
    for script in (train, distill, sample):
        assert script.main([]) == 2
        assert script.main(["--help"]) == 0
    assert "--config_path" in capsys.readouterr().out


# --- in processes of their own ---------------------------------------------------------------


@contextlib.contextmanager
def started(*arguments, **options):
    """A process with these arguments, killed at the end if it is still there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_updates(process, metrics, stage=0):
    for _ in range(2400):
        if metrics.exists() and f'"stage": {stage}' in metrics.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("no update within four minutes")


@pytest.mark.parametrize("script", [train, distill])
def test_ctrl_c_in_the_last_save_of_a_stage_is_heard(
    workshop, tmp_path, monkeypatch, capsys, script
):
    def interrupted(path, checkpoint):
        save_checkpoint(path, checkpoint)
        if checkpoint.update in (3, 4):  # the last of the stage
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("training.stages.save_checkpoint", interrupted)
    if script is train:
        arguments = ("--config_path", workshop["config"])
    else:
        arguments = ("--teacher_model_checkpoint", workshop["teacher"])
    assert run(script, *arguments, "--output", tmp_path) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "student-2.pt").exists()


def test_who_stops_a_restarted_run_is_told_not_to_restart_it(
    workshop, tmp_path, capsys, monkeypatch
):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    given = ("--config_path", workshop["config"], "--output", base, "--restart")

    def interrupted(path, checkpoint):
        save_checkpoint(path, checkpoint)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("training.stages.save_checkpoint", interrupted)
        assert run(train, *given) == 130
    assert "without --restart, which would DELETE it" in capsys.readouterr().err
    (saved,) = base.glob("diffusion-*.pt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun starts it again, as it was
    assert run(train, *given) == 0
    assert f"going on from {saved}" in capsys.readouterr().out


def test_the_command_that_train_py_names_runs(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos of mine"
    folder.mkdir()
    for n in range(5):
        Image.new("RGB", (32, 32), (50 * n, 0, 0)).save(folder / f"{n}.png")
    config = write_config(tmp_path, data={"channels": 3})
    monkeypatch.chdir(tmp_path)
    settings = ("data.name=image_folder", f"data.root={folder}", "data.workers=0")
    assert run(train, "--config_path", config, "--output", "out/mine", "--set", *settings) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["python", "distill.py"]
    assert run(distill, *command[2:]) == 0
    assert load_checkpoint(Path("output/distilled/mine/student-2.pt")).config.data.root == str(
        folder
    )
    # Nor does a YAML of other data take its folder away.
    assert run(distill, *command[2:4], "--config_path", config, "--output", "other") == 0
    assert load_checkpoint(Path("other/student-2.pt")).config.data.root == str(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number):
    config = write_config(tmp_path, training={"updates": 10**6, "checkpoint_every": 10**6})
    out = tmp_path / "out"
    with started("train.py", "--config_path", config, "--output", out) as process:
        # the log is buffered: some hundred updates fill it for the first time
        wait_for_updates(process, out / "metrics.jsonl")
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = err.strip().splitlines()[-1]
    assert "stopped and saved at update" in last
    assert "run the same command again to go on" in last
    (saved,) = out.glob("diffusion-*.pt")
    assert load_checkpoint(saved).update == int(saved.stem.removeprefix("diffusion-"))
    assert any(key.startswith("loss_logsnr_") for key in read_metrics(out / "metrics.jsonl")[-1])


def test_ctrl_c_in_the_middle_of_a_stage_of_the_ladder(workshop, tmp_path):
    settings = "distillation.updates_per_stage=[1, 1000000]"
    with started(
        *("distill.py", "--teacher_model_checkpoint", workshop["teacher"]),
        *("--output", tmp_path, "--set", settings, "distillation.checkpoint_every=1000000"),
    ) as process:
        wait_for_updates(process, tmp_path / "metrics.jsonl", stage=2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "(student 2); run the same command again" in err.strip().splitlines()[-1]
    assert (tmp_path / "student-4.pt").exists()
    (saved,) = tmp_path.glob("student-2-*.pt")
    assert load_checkpoint(saved).optimizer is not None


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(workshop, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(workshop["base"] / "diffusion-2.pt", base)
    limit = (base / "diffusion-2.pt").stat().st_size // 2
    with started(
        *("train.py", "--config_path", workshop["config"], "--output", base),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    ) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    last = err.strip().splitlines()[-1]
    assert last == f"error: {base}/diffusion-4.pt: not written: File too large"
    assert "Traceback" not in err
    assert [p.name for p in base.glob("*.pt")] == ["diffusion-2.pt"]
    assert load_checkpoint(base / "diffusion-2.pt").update == 2
    assert not list(base.glob(".*"))


def test_an_output_that_is_a_file_is_one_line(workshop, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    common = ("--config_path", workshop["config"], "--output", tmp_path / "file" / "x")
    assert "file" in refused(capsys, train, *common)


def test_help_answers_without_importing_torch():
    code = "import sys, {0}; {0}.main(['--help']); sys.exit('torch' in sys.modules)"
    for script in ("train", "distill", "sample", "evaluate", "tools.publish"):
        with started("-c", code.format(script)) as process:
            process.communicate(timeout=120)
        assert process.returncode == 0


def test_the_tutorials_commands_word_for_word(tmp_path, monkeypatch):
    """The tutorial's two commands, their sizes alone brought down by --set."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    small = ["model.channels=8", "model.patch_size=4", "model.attention_resolutions=[8]"]
    small += [
        "model.blocks_per_level=1",
        "model.channel_multipliers=[1,1]",
        "training.batch_size=2",
        "training.updates=1",
    ]
    config = ("--config_path", "configs/ddpm_32x32_v_continuous.yaml")
    assert run(train, *config, "--set", *small, "sampling.steps=1", "sampling.grid=4") == 0
    checkpoint = Path("output/ddpm_32x32_v_continuous/diffusion-1.pt")
    checkpoint.rename(checkpoint.with_name("diffusion-10000.pt"))
    teacher = "output/ddpm_32x32_v_continuous/diffusion-10000.pt"
    arguments = [*config, "--teacher_model_checkpoint", teacher]
    arguments += ["--initial_sampling_steps", "512", "--distillation_iterations", "7"]
    faster = ["distillation.updates_per_stage=1", "distillation.batch_size=2"]
    monkeypatch.setattr("evaluation.report.NUM_IMAGES", 2)
    assert run(distill, *arguments, "--set", *faster, "sampling.grid=2") == 0
    output = Path("output/distilled/ddpm_32x32_v_continuous")
    students = sorted(int(p.stem.split("-")[1]) for p in output.glob("student-*.pt"))
    assert students == [8, 16, 32, 64, 128, 256, 512]
