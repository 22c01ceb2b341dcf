"""What is asked for arrives: values of a config, options, seeds, pictures, and make's commands."""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import distill
import evaluate
import sample
import train
from evaluation import report
from evaluation.jobs import plan_jobs
from pipeline.build import load_denoiser
from pipeline.checkpoint import digest, load_checkpoint, save_checkpoint
from pipeline.config import load_config, make_config
from pipeline.sampling import SampleRequest
from pipeline.sections import EngineConfig
from tests.commands import refused, run, write_config
from tests.test_scripts import trained
from tests.toys import tiny
from tools import publish, race, train_autoencoder
from training.ladder import distillation_config
from training.metrics import read_metrics
from training.stage import base_stage, student_stages
from utils.processes import World

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model and its ladder; the students also by their steps."""
    files = trained(tmp_path_factory.mktemp("made"))
    return files | {n: files["ladder"] / f"student-{n}.pt" for n in (4, 2)}


# --- values of a config -------------------------------------------------------------------------


def test_every_value_of_a_recipe_reaches_its_stage():
    shared = {"batch_size": 6, "accumulate": 3, "gradient_clip": 0.5, "checkpoint_every": 7}
    base = {**shared, "updates": 11, "learning_rate": 0.02, "warmup": 3, "weight_decay": 0.1}
    base |= {"ema_decay": 0.75}
    own = {"batch_size": 9, "accumulate": 2, "gradient_clip": 0.25, "checkpoint_every": 5}
    own |= {"warmup": 4, "ema_decay": 0.5, "walker_decay": 0.125, "pull": 0.3}
    ladder = {"ladder": [8, 4, 2], "updates_per_stage": [13, 17], "method": "tract"}
    values = tiny(data={"horizontal_flip": True}, seed=5)
    config = make_config(values | {"training": base, "distillation": own | ladder}, "x")
    of_both = {"seed": 5, "horizontal_flip": True}
    stages = [base_stage(config), *student_stages(config)]
    wanted = [base, *(own | {"updates": n, "updates_after": m} for n, m in ((13, 17), (17, 0)))]
    for stage, values in zip(stages, wanted, strict=True):
        assert {key: vars(stage)[key] for key in values | of_both} == values | of_both


def test_a_run_keeps_as_many_checkpoints_as_asked(tmp_path):
    training = {"updates": 5, "checkpoint_every": 1, "keep_checkpoints": 2, "milestone_every": 2}
    config = write_config(tmp_path, training=training)
    assert run(train, "--config_path", config, "--output", tmp_path / "out") == 0
    left = sorted(path.stem for path in (tmp_path / "out").glob("*.pt"))
    assert left == ["diffusion-2", "diffusion-4", "diffusion-5"]


def test_a_run_goes_on_with_other_places_and_files_but_learns_the_same(made, tmp_path, capsys):
    shutil.copytree(made["base"], tmp_path / "base")
    (tmp_path / "data").symlink_to(ROOT / "data")
    given = ("--config_path", made["config"], "--output", tmp_path / "base", "--set")
    free = [f"data.root={tmp_path / 'data'}", "data.workers=1", "training.checkpoint_every=3"]
    free += ["training.keep_checkpoints=2", "training.milestone_every=2"]
    assert run(train, *given, *free) == 0
    assert "training.warmup" in refused(capsys, train, *given, "training.warmup=9")


def test_another_seed_is_another_training(made, tmp_path):
    still = ("--set", "training.updates=1", "training.learning_rate=1e-30")
    initial = ("--initialise", made["teacher"])
    weights, losses = [], []
    for seed in (1, 2):
        given = ("--config_path", made["config"], *still, f"seed={seed}", "--output")
        assert run(train, *given, tmp_path / f"random-{seed}") == 0
        weights.append(load_checkpoint(tmp_path / f"random-{seed}" / "diffusion-1.pt").model)
        assert run(train, *given, tmp_path / f"same-{seed}", *initial) == 0
        losses.append(read_metrics(tmp_path / f"same-{seed}" / "metrics.jsonl")[0]["loss"])
    assert digest(weights[0]) != digest(weights[1]), "other weights to begin with"
    assert losses[0] != losses[1], "other images, times and noise"


def test_a_ladder_takes_sampling_engine_and_workers_of_what_is_asked(made, capsys):
    given = ("--teacher_model_checkpoint", made["teacher"], "--print_config", "--set")
    capsys.readouterr()
    values = ("sampling.steps=5", "engine.precision=bf16", "data.workers=1")
    assert run(distill, *given, *values) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["sampling"]["steps"] == 5
    assert printed["engine"]["precision"] == "bf16"
    assert printed["data"]["workers"] == 1


def test_a_base_model_is_sampled_as_its_config_says(made, tmp_path):
    stored, path = load_checkpoint(made["teacher"]), tmp_path / "a.pt"
    other = stored.config.sampling.model_copy(update={"sampler": "ancestral", "steps": 3})
    config = stored.config.model_copy(update={"sampling": other})
    save_checkpoint(path, replace(stored, config=config))
    drawn = {}
    for name, *given in (
        ("own", path),
        ("asked", made["teacher"], "--sampler", "ancestral", "--steps", 3),
        ("ddim", path, "--sampler", "ddim"),
        ("unclipped", path, "--no-clip"),
    ):
        out = tmp_path / f"{name}.npz"
        assert run(sample, "--checkpoint", *given, "--count", 4, "--output", out) == 0
        drawn[name] = np.load(out)["arr_0"]
    assert np.array_equal(drawn["own"], drawn["asked"])
    assert not np.array_equal(drawn["own"], drawn["ddim"])
    assert not np.array_equal(drawn["own"], drawn["unclipped"])
    (job,) = plan_jobs({path: load_checkpoint(path)}, ["ddim"], None, 20, None)
    assert job.steps == 3


# --- defaults -----------------------------------------------------------------------------------


def test_a_students_ladder_has_a_folder_of_its_own(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    steps = ("--initial_sampling_steps", 2, "--distillation_iterations", 1)
    assert run(distill, "--teacher_model_checkpoint", made[4], *steps) == 0
    student = Path("output/distilled/tiny-from-4-steps/student-2.pt")
    assert student.exists()
    assert f"next: python sample.py --checkpoint {student}" in capsys.readouterr().out


def test_data_without_a_classifier_are_measured_by_inception(made, tmp_path, monkeypatch):
    asked = []
    extractor = "evaluation.features.make_extractor"
    monkeypatch.setattr(extractor, lambda name, device: asked.append(name) or 1 / 0)
    stored = load_checkpoint(made["teacher"])
    for name in ("mnist", "inverted_mnist"):
        data = stored.config.data.model_copy(update={"name": name})
        path = tmp_path / f"{name}.pt"
        config = stored.config.model_copy(update={"data": data})
        save_checkpoint(path, replace(stored, config=config))
        with pytest.raises(ZeroDivisionError):
            run(evaluate, "--checkpoint", path, "--output", tmp_path / "out")
    assert asked == ["digits", "inception"]


def test_weights_are_published_in_full_unless_half_is_asked_for(made, tmp_path):
    stored = load_checkpoint(made[4])
    for half in ([], ["--half"]):
        given = ("--checkpoint", made[4], "--name", "a", "--output", tmp_path, *half)
        assert run(publish, *given) == 0
        published = load_checkpoint(tmp_path / "a-4-steps.safetensors")
        assert (digest(published.weights) == digest(stored.weights)) == (not half)


def test_published_weights_leave_the_engine_to_their_user(made, tmp_path):
    stored = load_checkpoint(made[4])
    trained = EngineConfig(precision="bf16", compile=True)
    config = stored.config.model_copy(update={"engine": trained})
    save_checkpoint(tmp_path / "x.pt", replace(stored, config=config))
    given = ("--checkpoint", tmp_path / "x.pt", "--name", "a", "--output", tmp_path)
    assert run(publish, *given) == 0
    assert load_checkpoint(tmp_path / "a-4-steps.safetensors").config == stored.config
    assert stored.config.engine == EngineConfig()


def test_a_published_student_says_what_it_began_with(made, tmp_path):
    lineage = {"teacher": "a", "initial": "b"}
    save_checkpoint(tmp_path / "x.pt", replace(load_checkpoint(made[4]), lineage=lineage))
    given = ("--checkpoint", tmp_path / "x.pt", "--name", "a", "--output", tmp_path)
    assert run(publish, *given) == 0
    assert load_checkpoint(tmp_path / "a-4-steps.safetensors").lineage == lineage


def test_a_printed_config_trains_no_autoencoder(made, tmp_path, capsys):
    given = ("--config_path", made["config"], "--output", tmp_path / "out", "--print_config")
    capsys.readouterr()
    assert run(train_autoencoder, *given) == 0
    assert make_config(yaml.safe_load(capsys.readouterr().out), "x") == load_config(made["config"])
    assert not (tmp_path / "out").exists()


def test_the_race_is_run_by_published_models():
    assert all((ROOT / path).exists() for path in race.PUBLISHED)


# --- errors and pictures ------------------------------------------------------------------------


def test_a_ladders_errors_are_those_of_its_checkpoints(made):
    def drawn(path, steps):
        checkpoint = load_checkpoint(path)
        denoiser = load_denoiser(checkpoint, path, CPU)
        request = SampleRequest.of(checkpoint, denoiser, World(CPU), steps=steps, clip=False)
        return request.sample(range(64)).double()

    reference = drawn(made["teacher"], 8)
    rows = json.loads((made["ladder"] / "ladder.json").read_text())["rows"]
    assert [row["num_steps"] for row in rows] == [4, 2]
    for row in rows:
        n = row["num_steps"]
        for path, said in ((made[n], "student_error"), (made["teacher"], "teacher_error")):
            error = (drawn(path, n) - reference).square().mean().item()
            assert row[said] == pytest.approx(error, rel=1e-4), said


def test_the_pictures_rows_are_what_they_are_called(tmp_path, monkeypatch):
    shown, titles = [], []
    monkeypatch.setattr(report, "make_grid", lambda images, *_: int(images.max()))
    monkeypatch.setattr(report, "_show", lambda axes, image, title: shown.append((title, image)))
    monkeypatch.setattr(
        report,
        "save_figure",
        lambda path, figure: titles.extend(t.get_text() for a in figure.axes for t in a.texts),
    )
    teachers = {n: torch.full((16, 1, 4, 4), float(n)) for n in (16, 8, 2)}
    students = {n: torch.full((16, 1, 4, 4), 100.0 + n) for n in (8, 2)}
    report.draw_pictures(tmp_path, teachers, students, 16, decode=lambda x: x)
    assert shown[:4] == [
        ("teacher, 16 steps", 16),
        ("teacher, 8 steps", 8),
        ("student, 8 steps", 108),
        ("student, 2 steps", 102),
    ]
    assert [image for _, image in shown[4:]] == [16, 108, 8, 102, 2]
    assert titles == [
        *("teacher, 16 steps", "student, 8 steps", "teacher, 8 steps"),
        *("student, 2 steps", "teacher, 2 steps"),
    ]


def test_a_runs_grid_is_that_of_its_averaged_weights(made, tmp_path):
    assert run(sample, "--checkpoint", made["teacher"], "--output", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").read_bytes() == made["teacher"].with_suffix(".png").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_the_images_they_draw(made, size):
    checkpoint = load_checkpoint(made["teacher"])
    denoiser = load_denoiser(checkpoint, made["teacher"], CPU)
    parts = [range(n, n + 2) for n in range(0, 14, 2)]
    shares = []
    for rank in range(size):
        request = SampleRequest.of(checkpoint, denoiser, World(CPU, rank, size), steps=1)
        shares.append([part for part, _ in request.shared(parts)])
    assert sorted(part.start for share in shares for part in share) == [p.start for p in parts]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- make ---------------------------------------------------------------------------------------


def stand_in(path):
    """The published model in place of one that make has yet to train."""
    if path.exists():
        return path
    steps = re.search(r"student-(\d+)", path.name)
    name = "mnist-by-class-teacher" if "conditional" in str(path) else "mnist-teacher"
    if steps is not None:
        kind = "mnist-tract" if "tract" in str(path) else "mnist"
        name = f"{kind}-{steps[1]}-step{'s' * (steps[1] != '1')}"
    return ROOT / "pretrained" / f"{name}.safetensors"


def test_what_make_trains_for_hours_is_checked_in_seconds():
    """Each command's config is valid, and each file that it reads is made by one before it."""
    command = ["make", "-n", "results", "by_class"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    made, checked = [], 0
    for words in (shlex.split(line) for line in said.replace("\\\n", " ").splitlines()):
        script = next((word for word in words if word in ("train.py", "distill.py")), None)
        options, key = {}, None
        for word in words:
            if word.startswith("--"):
                key = word
            elif key is not None:
                options.setdefault(key, []).append(word)
        for read in ("--checkpoint", "--initialise", "--teacher_model_checkpoint"):
            for path in options.get(read, []):
                known = any(fnmatch(one, path) for one in made)
                assert known or not path.startswith("output/"), f"{path}: nothing makes it"
        if script is None:
            continue
        config_path = Path(options["--config_path"][0]) if "--config_path" in options else None
        where, sets = config_path and ROOT / config_path, options.get("--set", [])
        if script == "train.py":
            updates = load_config(where, sets).training.updates
            made.append(f"output/{config_path.stem}/diffusion-{updates}.pt")
        else:
            teacher = stand_in(ROOT / options["--teacher_model_checkpoint"][0])
            config = distillation_config(load_checkpoint(teacher), teacher, where, sets)
            assert student_stages(config)
            folder = Path("output/distilled") / (config_path or teacher).stem
            folder = options.get("--output", [folder])[0]
            made += [f"{folder}/student-{n}.pt" for n in config.distillation.steps()[1:]]
        checked += 1
    assert checked > 10
