"""Which folders and files the scripts write to: not another run's, not half, not by mistake."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import distill
import evaluate
import sample
import train
from evaluation.curves import draw_distances
from evaluation.quality import Quality
from evaluation.results import Results, Row, read_results
from evaluation.tables import markdown, summary, write_results
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from tests.commands import refused, run
from tests.toys import tiny
from tools import publish
from training.folder import kept_to_itself
from utils.command import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A base model of one update and its ladder 4 -> 2, made through the command line."""
    folder = tmp_path_factory.mktemp("folders")
    config = folder / "tiny.yaml"
    short = {"updates_per_stage": 1}
    config.write_text(yaml.safe_dump(tiny(training={"updates": 1}, distillation=short)))
    base, ladder = folder / "base", folder / "ladder"
    assert run(train, "--config_path", config, "--output", base) == 0
    teacher = base / "diffusion-1.pt"
    assert run(distill, "--teacher_model_checkpoint", teacher, "--output", ladder) == 0
    return {"config": config, "base": base, "ladder": ladder, "teacher": teacher}


def contents(folder):
    """Every file and folder below, with what the files hold."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def without_checkpoints(ladder):
    for path in ladder.glob("*.pt"):
        path.unlink()


# --- another kind of run lives there --------------------------------------------------------


@pytest.mark.parametrize("restart", [(), ("--restart",)], ids=["", "restart"])
@pytest.mark.parametrize("change", [None, without_checkpoints], ids=["whole", "metrics alone"])
def test_training_leaves_a_ladder_alone(workshop, tmp_path, capsys, restart, change):
    ladder = shutil.copytree(workshop["ladder"], tmp_path / "ladder")
    if change is not None:
        change(ladder)
    before = contents(ladder)
    given = ("--config_path", workshop["config"], "--output", ladder, *restart)
    assert f"{ladder}: holds a ladder; give another folder" in refused(capsys, train, *given)
    assert contents(ladder) == before


def test_a_config_that_names_a_ladders_folder_trains_elsewhere(workshop, tmp_path, capsys):
    ladder = shutil.copytree(workshop["ladder"], tmp_path / "ladder")
    before = contents(ladder)
    given = ("--config_path", workshop["config"], "--set", f"output={ladder}")
    assert "holds a ladder" in refused(capsys, train, *given)
    assert contents(ladder) == before


@pytest.mark.parametrize("restart", [(), ("--restart",)], ids=["", "restart"])
def test_a_ladder_leaves_a_training_alone(workshop, tmp_path, capsys, restart):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    before = contents(base)
    given = ("--teacher_model_checkpoint", workshop["teacher"], "--output", base, *restart)
    assert "holds the training of a base model" in refused(capsys, distill, *given)
    assert contents(base) == before


def test_a_longer_ladder_is_not_begun_where_another_ends(workshop, tmp_path, capsys):
    """Its first stage would drop the metrics of all later ones before anything is noticed."""
    ladder = shutil.copytree(workshop["ladder"], tmp_path / "ladder")
    metrics = (ladder / "metrics.jsonl").read_bytes()
    given = ("--teacher_model_checkpoint", workshop["teacher"], "--output", ladder)
    longer = ("--initial_sampling_steps", 8, "--distillation_iterations", 3)
    assert "student-2.pt: of another ladder" in refused(capsys, distill, *given, *longer)
    others = ("--initial_sampling_steps", 3, "--distillation_iterations", 1)
    assert "student-4.pt: of another ladder" in refused(capsys, distill, *given, *others)
    assert (ladder / "metrics.jsonl").read_bytes() == metrics
    assert not (ladder / "student-8.pt").exists()
    shorter = ("--initial_sampling_steps", 4, "--distillation_iterations", 1)
    assert run(distill, *given, *shorter) == 0


@pytest.mark.parametrize("kind", ["base", "ladder"])
def test_what_is_measured_or_drawn_does_not_go_among_a_runs_files(
    workshop, tmp_path, capsys, kind, monkeypatch
):
    folder = shutil.copytree(workshop[kind], tmp_path / kind)
    for picture in folder.glob("*.png"):
        picture.unlink()  # else it is refused as other pictures
    before = contents(folder)
    given = ("--checkpoint", workshop["teacher"], "--output")
    assert "holds " in refused(capsys, evaluate, *given, folder)
    assert "holds " in refused(capsys, sample, *given, folder, "--count", 2)
    monkeypatch.setattr("pipeline.sample_files.write_grid", lambda *_: pytest.fail("drawn"))
    for name in ("loss.png", "comparison.png", "student-4.png", "diffusion-1.png"):
        assert "writes it; give another name" in refused(capsys, sample, *given, folder / name)
    assert contents(folder) == before


# --- looks first, then deletes --------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusion-7.pt", "metrics.jsonl", "loss.png", "diffusion-1.png"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("restart", [(), ("--restart",)], ids=["", "restart"])
def test_what_is_no_file_is_found_before_anything_is_deleted(
    workshop, tmp_path, capsys, name, make, restart
):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    make(base / name)
    before = contents(base)
    given = ("--config_path", workshop["config"], "--output", base, *restart)
    assert f"{base / name}: no" in refused(capsys, train, *given)
    assert contents(base) == before


@pytest.mark.parametrize("name", ["00000.safetensors", "ladder.md", "student-2.png"])
def test_a_ladder_does_not_wait_for_a_pipe(workshop, tmp_path, capsys, name):
    ladder = shutil.copytree(workshop["ladder"], tmp_path / "ladder")
    path = next(ladder.rglob(name))
    path.unlink()
    os.mkfifo(path)
    given = ("--teacher_model_checkpoint", workshop["teacher"], "--output", ladder)
    assert f"{name}: no regular file" in refused(capsys, distill, *given)


def test_restart_leaves_what_others_keep_beside_tensorboards_files(workshop, tmp_path):
    base = shutil.copytree(workshop["base"], tmp_path / "base")
    (base / "tensorboard" / "notes.txt").write_text("mine")
    (old,) = base.glob("tensorboard/stage-0/*")
    given = ("--config_path", workshop["config"], "--output", base, "--restart")
    assert run(train, *given) == 0
    assert (base / "tensorboard" / "notes.txt").read_text() == "mine"
    assert not old.exists()


def test_what_a_kill_left_half_written_is_deleted(workshop, tmp_path):
    ladder = shutil.copytree(workshop["ladder"], tmp_path / "ladder")
    (images,) = {path.parent for path in ladder.glob("images/student-2-*/*.safetensors")}
    halves = [ladder / ".student-2.pt.12.tmp", images / ".00000.safetensors.12.tmp"]
    for path in (*halves, images / ".notes.tmp"):
        path.write_text("half of a file")
    given = ("--teacher_model_checkpoint", workshop["teacher"], "--output", ladder)
    assert run(distill, *given) == 0
    assert [path.exists() for path in halves] == [False, False]
    assert (images / ".notes.tmp").exists(), "no name that atomic_write gives"


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["", " "])
def test_an_empty_output_is_not_the_current_folder(workshop, tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    for script, *given in (
        (train, "--config_path", workshop["config"]),
        (distill, "--teacher_model_checkpoint", workshop["teacher"]),
        (sample, "--checkpoint", workshop["teacher"], "--count", 2),
        (evaluate, "--checkpoint", workshop["teacher"], "--count", 10),
        (publish, "--checkpoint", workshop["teacher"], "--name", "x"),
    ):
        said = refused(capsys, script, *given, "--output", output)
        assert f"--output {output!r}: not the name of a file or folder" in said
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_is_asked_for(workshop, tmp_path, capsys):
    file = tmp_path / "hostname"
    file.write_text("mine")
    for script, *given in (
        (train, "--config_path", workshop["config"]),
        (distill, "--teacher_model_checkpoint", workshop["teacher"]),
        (sample, "--checkpoint", workshop["teacher"], "--count", 2),
        (publish, "--checkpoint", workshop["teacher"], "--name", "x"),
    ):
        for output in (file, file / "below"):
            said = refused(capsys, script, *given, "--output", output)
            assert said == f"error: {file}: a file, where a folder is asked for"
    assert file.read_text() == "mine"


def test_what_a_name_ends_in_says_what_is_written(workshop, tmp_path, capsys):
    given = ("--checkpoint", workshop["teacher"], "--count", 2, "--steps", 1, "--output")
    assert run(sample, *given, tmp_path / "a.NPZ") == 0
    assert (tmp_path / "a.NPZ").is_file()
    assert run(sample, *given, tmp_path / "run.1") == 0
    assert len(list((tmp_path / "run.1").iterdir())) == 2
    for ending in ("webp", "jpeg", "TIFF", "gz", "npy", "pt", "mp4"):
        assert "a folder or a .npz" in refused(capsys, sample, *given, tmp_path / f"b.{ending}")
        assert not (tmp_path / f"b.{ending}").exists()
    (tmp_path / "c.png").mkdir()
    said = refused(capsys, sample, *given[:2], "--output", tmp_path / "c.png")
    assert "c.png: a folder, where a .png file is asked for" in said


@pytest.mark.parametrize("name", ["", " ", "a/b", "../x", "-x", "a\nb", "a\0"])
def test_published_files_have_a_name_and_a_folder(workshop, tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("--checkpoint", workshop["teacher"], f"--name={name}")
    assert "required: --output" in refused(capsys, publish, *given)
    assert "--name " in refused(capsys, publish, *given, "--output", "out")
    assert not list(tmp_path.iterdir())


# --- a run's end where the disk is full or gone ---------------------------------------------


def train_in_a_process(workshop, output, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["train.py", "--config_path", workshop["config"], "--output", output]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize("limit", [0, 60, 900])
def test_a_full_disk_is_one_line_with_the_path(workshop, tmp_path, limit):
    """Of TensorBoard's file, of the metrics, of the first checkpoint, by how much goes in."""
    done = train_in_a_process(
        workshop,
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if "File too large" in line]
    assert error.startswith(f"error: {tmp_path / 'out'}/")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_deleted_in_mid_run_is_one_line(workshop, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"

    def gone(path, checkpoint):
        shutil.rmtree(out)
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr("training.stages.save_checkpoint", gone)
    assert run(train, "--config_path", workshop["config"], "--output", out) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {out}/")
    assert load_checkpoint(out / "diffusion-1.pt").update == 1, "the weights are not lost"


# --- tables ---------------------------------------------------------------------------------


def row(name, kind="images", steps=None):
    quality = Quality(100, 1.5, 0.1, 0.01, 0.9, 0.8)
    return Row(name, kind, "ddim" if steps else "", steps, quality, run="r|un" if steps else "")


def test_names_are_escaped_in_tables(tmp_path):
    hostile = ["a|b", "a\nb", "a\x1b[31mb", "a\udc80b", "$\\frac$", "_a"]
    rows = [row(name) for name in hostile]
    results = Results("digits", {}, [*rows, row("x|y", "base", 8), row("s", "student", 4)])
    lines = markdown(results).splitlines()
    assert len(lines) == 2 + len(results.rows), "a row, a line"
    cells = {line.replace(r"\|", "").count("|") for line in lines}
    assert len(cells) == 1, "as many cells in each"
    table = summary(results).splitlines()[2:]
    assert {line.replace(r"\|", "").count("|") for line in table} == {4}
    assert "\x1b" not in markdown(results)
    write_results(tmp_path, results)
    assert read_results(tmp_path / "results.json") == results
    assert "distances.png" in (tmp_path / "results.md").read_text()
    draw_distances(tmp_path / "distances.png", results)
    assert (tmp_path / "distances.png").exists()


def test_results_that_are_not_results_are_one_line(tmp_path):
    path = tmp_path / "results.json"
    write_results(tmp_path, Results("digits", {}, [row("a")]))
    assert "distances.png" not in (tmp_path / "results.md").read_text(), "there is none"
    whole = json.loads(path.read_text())
    for key, value in (("kind", "evil"), ("steps", "many"), ("quality", {}), ("name", None)):
        broken = {**whole, "rows": [{**whole["rows"][0], key: value}]}
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"results\.json: damaged"):
            read_results(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"results\.json: damaged"):
        read_results(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"results\.json: not a regular file"):
        read_results(path)


def test_a_student_of_the_same_name_but_another_stage_is_of_another_ladder(workshop, tmp_path):
    from training.folder import require_same_ladder

    student = workshop["ladder"] / "student-4.pt"
    shutil.copy(student, tmp_path)
    require_same_ladder(tmp_path, (4, 2), 1)
    require_same_ladder(tmp_path, (32, 16, 8), 1)
    save_checkpoint(tmp_path / "student-4.pt", replace(load_checkpoint(student), stage=3))
    with pytest.raises(InputError, match=r"student-4\.pt: of another ladder"):
        require_same_ladder(tmp_path, (4, 2), 1)


def test_a_lock_on_a_file_that_its_owner_deleted_is_no_lock(tmp_path, monkeypatch):
    """Another run ends, and deletes the file, between this one's opening and locking it."""
    lockf, tries = fcntl.lockf, []

    def late(file, how):
        tries.append(file.name)
        if len(tries) == 1:
            (tmp_path / ".lock").unlink()
        return lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with kept_to_itself(tmp_path) as alone:
        assert alone
        assert (tmp_path / ".lock").exists()
    assert len(tries) == 2
    assert not (tmp_path / ".lock").exists()


def test_a_guided_student_is_no_critics_teacher(tmp_path, capsys):
    teacher = ROOT / "pretrained" / "mnist-by-class-8-steps.safetensors"
    losses = "distillation.losses={snr_trunc: 1.0, adversarial: 0.1}"
    recipe = ("distillation.ladder=[8,4]", "distillation.updates_per_stage=1", losses)
    recipe += ("distillation.learning_rate=1.0e-4", "distillation.time_exponent=1.0")
    given = ("--teacher_model_checkpoint", teacher, "--output", tmp_path / "x", "--set", *recipe)
    line = refused(capsys, distill, *given)
    assert f"{teacher}: distillation.losses: adversarial takes the features" in line
    assert "begin the ladder with an unguided one" in line
