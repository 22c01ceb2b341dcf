"""evaluate.py and published weights, as their users run them."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import distill
import evaluate
import sample
import train
from evaluation.comparison import Comparison
from evaluation.features import Extractor
from evaluation.gallery import CHUNK, Gallery, RealImages, real_images
from evaluation.jobs import (
    Partners,
    name_of_images,
    plan_jobs,
    require_different_names,
    with_engine,
)
from evaluation.quality import Quality, asked_share, nearest
from evaluation.results import Results, Row, by_curve, finest_base
from evaluation.tables import against_base, summary
from pipeline.build import build_dataset, build_denoiser, build_network
from pipeline.checkpoint import Checkpoint, digest, load_checkpoint, publish_checkpoint
from pipeline.config import make_config
from pipeline.data import read_mnist
from pipeline.sampling import SampleRequest
from tests.commands import run
from tests.toys import tiny
from tools import publish
from utils.command import InputError
from utils.processes import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _fewer_real_images():
    """The features of 80,000 images take half a minute."""

    def few(config):
        real = real_images(config)
        return RealImages(real.reference[:2000], real.floor[:1000], real.training[:1000])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.gallery.real_images", few)
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny ladder 8 -> 4 -> 2, published, and measured."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    assert run(train, "--config_path", config, "--output", folder / "base") == 0
    teacher = folder / "base" / "diffusion-4.pt"
    assert run(distill, "--teacher_model_checkpoint", teacher, "--output", folder / "ladder") == 0
    made = [teacher, folder / "ladder" / "student-4.pt", folder / "ladder" / "student-2.pt"]
    out = folder / "pretrained"
    assert run(publish, "--checkpoint", *made, "--name", "tiny", "--output", out, "--half") == 0
    published = [out / f"tiny-{n}.safetensors" for n in ("teacher", "4-steps", "2-steps")]
    measured = folder / "measured"
    command = ("--checkpoint", *published, "--steps", 2, 8, "--sampler", "ddim", "ancestral")
    command = (*command, "--count", 260, "--max_calls", 1000, "--output", measured)
    assert run(evaluate, *command) == 0
    return {
        "made": made,
        "published": published,
        "command": command,
        "measured": measured,
        "config": config,
    }


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_every_checkpoint_sampler_and_step_count_is_measured(workshop):
    rows = rows_of(workshop["measured"])
    found = {(r["name"], r["sampler"], r["steps"], r["quality"]["count"]) for r in rows}
    teacher = {
        ("tiny-teacher", s, n, c) for s in ("ddim", "ancestral") for n, c in ((2, 260), (8, 125))
    }
    students = {("tiny-4-steps", "ddim", 4, 250), ("tiny-2-steps", "ddim", 2, 260)}
    real = ("real images", "real images on noise")
    floors = {(name, "", None, count) for name in real for count in (125, 250, 260)}
    assert found == teacher | students | floors
    for row in rows:
        assert sum(row["quality"]["classes"]) == pytest.approx(1.0)
        assert row["quality"]["frechet_interval"] > 0
    of = {(r["name"], r["quality"]["count"]): r["quality"]["frechet"] for r in rows}
    assert of[real[0], 260] < of[real[1], 260], "the features see noise that people do not"
    floor = max(r["quality"]["frechet"] for r in rows if r["kind"] == "floor")
    assert floor < min(r["quality"]["frechet"] for r in rows if r["name"] not in real)


def test_a_student_is_compared_with_its_base_over_the_same_sets_of_noise(workshop):
    table = (workshop["measured"] / "results.md").read_text().splitlines()
    lines = [line for line in table if line.startswith("| ") and "less its base's" in line]
    titles = [cell.strip() for cell in lines[0][1:-1].split("|")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table if "tiny-" in line]
    known = [dict(zip(titles, row, strict=True)) for row in rows if len(row) == len(titles)]
    student = next(row for row in known if row["checkpoint"] == "tiny-2-steps")
    base = next(row for row in known if row["n"] == "260" and row["sampler"] == "ddim")
    distances = [float(row["Frechet distance"].split(" ± ")[0]) for row in (student, base)]
    difference, ratio = (student[f"{word} its base's"] for word in ("less", "over"))
    assert float(difference.split(" ± ")[0]) == pytest.approx(distances[0] - distances[1], abs=2e-3)
    assert float(ratio.split(" ± ")[0]) == pytest.approx(distances[0] / distances[1], abs=1e-2)
    assert base["less its base's"] == "", "it is the base itself"
    assert 0 <= float(student["faint pixels"]) <= 1
    assert 0 <= float(student["border"]) <= 255


def test_a_student_is_compared_with_its_teacher_from_the_same_noise(workshop):
    rows = {(r["name"], r["sampler"], r["steps"]): r for r in rows_of(workshop["measured"])}
    student = rows["tiny-2-steps", "ddim", 2]
    assert student["to_teacher"] > 0, "its teacher makes 4 steps, and is among them"
    assert student["to_base"] > 0
    assert 0 <= student["same_class"] <= 1
    first = rows["tiny-4-steps", "ddim", 4]
    assert first["to_teacher"] == pytest.approx(first["to_base"]), "the base at 8 steps is both"
    assert first["teachers_class"] == first["same_class"]
    assert 0 <= student["teachers_class"] <= 1
    assert rows["tiny-teacher", "ddim", 2]["to_teacher"] is None


def test_conditional_models_are_asked_for_classes():
    logits = torch.eye(10).repeat(3, 1)
    assert asked_share(logits, 10) == 1.0
    assert asked_share(logits.roll(1, 0), 10) == 0.0
    assert asked_share(logits, 3) is None
    assert asked_share(None, 10) is None


def test_tables_and_a_figure_are_written(workshop):
    folder = workshop["measured"]
    table = (folder / "results.md").read_text()
    assert "| tiny-2-steps | ddim | 2 | 260 |" in table
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows_of(folder))
    assert float(lines[0]["frechet"]) > 0
    with Image.open(folder / "distances.png") as picture:
        assert picture.width > 500
        assert len(set(picture.convert("RGB").getdata())) > 50
    assert (folder / "nearest-tiny-tiny-2-steps-ddim-2.png").exists()


def test_the_summary_has_distances_by_steps_and_ratios_of_as_many_samples():
    def row(kind, steps, count, frechet, sampler="ddim", name="t", run="r", update=9):
        quality = Quality(count, frechet, 0.1, 0.0, 0.0, 0.0)
        return Row(name, kind, sampler, steps, quality, run=run, update=update)

    rows = [
        row("base", 1024, 200, 8.0, name="e", update=5),
        row("base", 1024, 200, 2.0),
        row("base", 8, 500, 9.0),
        row("base", 8, 500, 7.0, "ancestral"),
        row("student", 8, 500, 2.5, name="s-8-steps"),
        row("student", 8, 200, 3.0, name="s-8-steps"),
        row("student", 4, 500, 4.0, name="s-4-steps"),
        row("student", 1, 500, 6.0, name="s-1-step"),
        row("student", 8, 200, 2.0, name="s-wide-8-steps, bf16"),
        row("student", 8, 200, 5.0, name="s-8-steps", run="other"),
        replace(row("student", 4, 200, 8.0, name="s-4-steps", run="other"), base_run="r"),
    ]
    said, _, *table = summary(Results("digits", {}, rows)).splitlines()
    assert said.endswith("a student's divided by that of its base model in 1024 steps of DDIM:")
    assert table[0] == (
        "| steps | other: s, distilled | r: s, distilled | s-wide, bf16, distilled "
        "| e, ddim | t, ancestral | t, ddim |"
    )
    assert table[2:] == [
        "| 1024 |  |  |  | 8.000 ± 0.100 |  | 2.000 ± 0.100 |",
        "| 8 | 5.000 ± 0.100 | 3.000 ± 0.100 (1.50) | 2.000 ± 0.100 (1.00) |  "
        "| 7.000 ± 0.100, n = 500 | 9.000 ± 0.100, n = 500 |",
        "| 4 | 8.000 ± 0.100 (4.00) | 4.000 ± 0.100, n = 500 |  |  |  |  |",
        "| 1 |  | 6.000 ± 0.100, n = 500 |  |  |  |  |",
    ]
    # Without students of 200 images, those of 500 are compared with the base's most steps of 500.
    few = [r for r in rows if (r.kind, r.quality.count) != ("student", 200)]
    assert "| 8 | 2.500 ± 0.100 (0.28) |" in summary(Results("digits", {}, few))
    assert summary(Results("digits", {}, rows[:4])) == ""


def test_nothing_is_drawn_or_measured_twice(workshop, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    command = (*workshop["command"][:-1], folder)
    drawn, measured = [], []
    row_of = Comparison.drawn
    monkeypatch.setattr(Comparison, "drawn", lambda *a: measured.append(a) or row_of(*a))
    draw = SampleRequest.draw
    monkeypatch.setattr(SampleRequest, "draw", lambda *a: drawn.append(a[1]) or draw(*a))
    before = (folder / "results.json").read_text()
    assert run(evaluate, *command) == 0
    assert not drawn
    assert not measured
    assert (folder / "results.json").read_text() == before
    chunk = sorted(folder.glob("images/tiny-teacher-ddim-2-*/00001.safetensors"))[0]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-7])
    half_written = chunk.with_name(f".{chunk.name}.123.tmp")  # of a killed evaluation
    half_written.touch()
    assert run(evaluate, *command) == 0
    assert not half_written.exists()
    assert sum(len(indices) for indices in drawn) == CHUNK
    assert chunk.read_bytes() == whole, "an image is a function of seed and index"


def test_no_images_are_searched_or_looked_at_twice(workshop, tmp_path, monkeypatch):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    for path in (folder / "results.json", *folder.glob("nearest-*.png")):
        path.unlink()
    searched, seen = [], []
    extract = Extractor.__call__
    monkeypatch.setattr(
        "evaluation.comparison.nearest", lambda a, b: searched.append(a) or nearest(a, b)
    )
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, a, *b: seen.append(digest(a)) or extract(self, a, *b)
    )
    assert run(evaluate, *workshop["command"][:-1], folder) == 0
    jobs = [row for row in rows_of(folder) if row["steps"]]
    assert len(jobs) == len(list(folder.glob("nearest-*.png"))) > 5
    assert len(searched) == 2 + 2 * len(jobs), "in pixels and in features, of real images as well"
    assert len(seen) <= len(set(seen)) + 1, "the base's most steps, for its rows of fewer steps"


def test_tables_and_pictures_that_a_stop_left_out_are_made(workshop, tmp_path):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert len(names) > 5
    for path in folder.iterdir():
        if path.name not in ("results.json", "images"):
            path.unlink()
    assert run(evaluate, *workshop["command"][:-1], folder) == 0
    assert {path.name for path in folder.iterdir()} == names


def test_rows_name_the_precision_that_was_asked_for(workshop):
    path = workshop["published"][0]
    stored = load_checkpoint(path)
    gallery = Gallery(Path(), World(CPU), seed=0, batch_size=125)

    def found(precision, compiled):
        checkpoint = with_engine(stored, CPU, precision, compiled)
        (job,) = plan_jobs({path: checkpoint}, ["ddim"], [2], 20, None)
        return job.key.name, gallery.key(checkpoint, "ddim", 2)

    (name, key), (other_name, other_key) = found(None, False), found("bf16", False)
    assert (name, other_name) == ("tiny-teacher", "tiny-teacher, bf16")
    assert key != other_key
    assert found("fp32", False) == found(None, True) == (name, key)


def test_a_student_of_several_steps_has_a_curve_of_its_own():
    """Or its points would replace those of the other students of the ladder."""

    def row(name, sampler, steps):
        return Row(name, "student", sampler, steps, Quality(100, 1.0, 0.1, 0.0, 0.0, 0.0))

    several = [row("s-1-step", "consistency", n) for n in (8, 1)]
    ladder = [row(f"s-{n}-steps", "ddim", n) for n in (8, 4)]
    curves = by_curve(Results("digits", {}, [*several, *ladder]))
    assert {name: sorted(rows) for name, rows in curves.items()} == {
        "s-1-step, distilled": [1, 8],
        "s, distilled": [4, 8],
    }


def test_students_of_two_runs_are_one_curve_unless_their_points_would_meet():
    def row(run, steps, base="b"):
        quality = Quality(100, 1.0, 0.1, 0.0, 0.0, 0.0)
        return Row(f"s-{steps}-steps", "student", "ddim", steps, quality, run=run, base_run=base)

    def curves(*rows):
        found = by_curve(Results("digits", {}, rows))
        return {name: sorted(points) for name, points in found.items()}

    assert curves(row("x", 8), row("y", 4)) == {"s, distilled": [4, 8]}
    apart = {"x: s, distilled": [8], "y: s, distilled": [4, 8]}
    assert curves(row("x", 8), row("y", 8), row("y", 4)) == apart
    of_other_bases = {"x: s, distilled": [8], "y: s, distilled": [4]}
    assert curves(row("x", 8), row("y", 4, base="c")) == of_other_bases


def test_distances_are_compared_in_pairs_from_the_same_noise_only():
    def row(kind, seed, count=100, steps=8):
        quality = Quality(
            count, 1.0, 0.1, 0.0, 0.0, 0.0, without=[1.0 + 0.01 * n for n in range(10)]
        )
        return Row(kind, kind, "ddim", steps, quality, run="r", seed=seed)

    base, same, other = row("base", 0), row("student", 0), row("student", 1)
    results = Results("digits", {}, [base, same, other])
    compared = against_base(same, results)
    assert compared is not None
    assert compared.ratio.value == 1
    assert against_base(other, results) is None
    assert against_base(row("student", 0, count=200), results) is None


def test_the_summary_keeps_to_the_number_of_images_that_most_rows_have():
    def row(steps, count, kind="base"):
        quality = Quality(count, 1.0, 0.1, 0.0, 0.0, 0.0)
        return Row("a", kind, "ddim", steps, quality, run="r")

    rows = [*(row(n, 200) for n in (128, 64, 32)), row(128, 500), row(64, 900)]
    rows += [row(4, count, "student") for count in (200, 500, 900)]
    assert finest_base(Results("digits", {}, rows)) == rows[0]


def test_images_are_named_by_their_folder_or_file(tmp_path, monkeypatch):
    names = [name_of_images(Path(path)) for path in ("a/run.1", "a/run.2", "a/x.NPZ")]
    assert names == ["run.1", "run.2", "x"]
    monkeypatch.chdir(tmp_path)
    assert name_of_images(Path(".")) == tmp_path.name
    require_different_names({}, [Path("a/run.1"), Path("a/run.2")])
    with pytest.raises(InputError, match="real images: two of this name"):
        require_different_names({}, [Path("a/real images")])


def test_rows_of_other_weights_go():
    def row(source, count, steps=8):
        quality = Quality(count, 1.0, 0.1, 0.0, 0.0, 0.0)
        return Row("s", "student", "ddim", steps, quality, run="r", source=source)

    before = Results("digits", {}, [row("old", 100), row("old", 200), row("old", 100, steps=4)])
    after = before.with_rows([row("new", 300)])
    assert {(r.source, r.quality.count, r.steps) for r in after.rows} == {
        ("new", 300, 8),
        ("old", 100, 4),
    }
    more = after.with_rows([row("new", 400)])
    assert len(more.rows) == 3, "of the same weights"


def test_features_of_other_weights_are_refused_before_drawing(workshop, tmp_path, capsys):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    results = json.loads((folder / "results.json").read_text())
    results["reference"]["features"] = "of other weights"
    (folder / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert run(evaluate, *workshop["command"][:-1], folder) == 2
    assert "measured by other weights of the features digits" in capsys.readouterr().err


def test_models_of_other_data_are_refused(workshop, tmp_path, capsys):
    digits = workshop["published"][2]
    student = load_checkpoint(digits)
    fashion = student.config.data.model_copy(update={"name": "fashion_mnist"})
    other = tmp_path / "fashion.safetensors"
    config = student.config.model_copy(update={"data": fashion})
    publish_checkpoint(other, replace(student, config=config), half=False)
    colours = tmp_path / "colours.yaml"
    colours.write_text(yaml.safe_dump(tiny(data={"name": "colored_mnist", "channels": 3})))
    for given, said in (
        ((digits, other), "fashion.safetensors: makes images of fashion_mnist, 32x32, 1 channels"),
        ((digits, "--config_path", colours), "compared with colored_mnist, 32x32, 3 channels"),
    ):
        capsys.readouterr()
        assert run(evaluate, "--checkpoint", *given, "--output", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_images_of_a_gpus_network_are_kept(tmp_path, monkeypatch):
    """It is channels_last, and so may its images be, which safetensors refuses."""
    colour = {"name": "colored_mnist", "channels": 3}
    pixels = {"patch_size": 1, "attention_resolutions": []}
    config = make_config(tiny(data=colour, model=pixels, diffusion={"prediction": "x"}), "tiny")
    network = build_network(config, CPU).eval()
    torch.nn.init.normal_(network.conv_out.weight)
    made = Checkpoint("base", "t", config, 1, 0, network.state_dict())
    network.to(memory_format=torch.channels_last)
    denoiser = build_denoiser(config, network, CPU)
    monkeypatch.setattr("evaluation.gallery.load_denoiser", lambda *a: denoiser)
    gallery = Gallery(tmp_path, World(CPU), seed=0, batch_size=125)
    drawn = gallery.images(made, Path("a.pt"), "ddim", 1, 10)
    assert torch.equal(gallery.images(made, Path("a.pt"), "ddim", 1, 10), drawn)
    assert drawn.float().std() > 1


def test_rows_of_an_earlier_call_stay(workshop, tmp_path):
    folder = shutil.copytree(workshop["measured"], tmp_path / "more")
    before = len(rows_of(folder))
    more = ("--checkpoint", workshop["published"][0], "--steps", 2, "--sampler", "dpm_solver++")
    assert run(evaluate, *more, "--count", 260, "--output", folder) == 0
    rows = rows_of(folder)
    assert len(rows) == before + 1
    assert any(row["sampler"] == "dpm_solver++" for row in rows)


def test_the_last_line_says_what_is_there(workshop, tmp_path, monkeypatch, capsys):
    threads: list[int] = []
    images = real_images(load_checkpoint(workshop["made"][0]).config).floor[:10]
    np.savez(tmp_path / "made.npz", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "made.npz").rename(tmp_path / "a|b.NPZ")
    out = tmp_path / "out"
    given = ("--images", tmp_path / "a|b.NPZ", "--config_path", workshop["config"])
    assert run(evaluate, *given, "--output", out) == 0
    said = capsys.readouterr().out
    tables = [str(out / f"results.{ending}") for ending in ("md", "json", "csv")]
    assert said.splitlines()[-1] == f"written: {', '.join(tables)}"
    assert r"| a\|b | 10 |" in said
    student = ("--checkpoint", workshop["published"][2], "--count", 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert run(evaluate, *student, "--output", out) == 0
    assert threads == [7 * torch.get_num_threads()], "those of all processes, to measure with"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f", {out / 'distances.png'}; the images drawn are in {out / 'images'}")
    assert len(list((out / "images").iterdir())) == 1


def test_a_partner_that_comes_later_is_told_of(workshop, tmp_path):
    base, _, student = workshop["published"]
    out = ("--count", 250, "--output", tmp_path)
    assert run(evaluate, "--checkpoint", student, *out) == 0
    assert run(evaluate, "--checkpoint", base, student, "--steps", 2, *out) == 0
    found = []
    for steps in (8, 4):  # a better one, then a worse one
        assert run(evaluate, "--checkpoint", base, student, "--steps", steps, *out) == 0
        found += [row for row in rows_of(tmp_path) if row["kind"] == "student"]
    assert [row["base_steps"] for row in found] == [8, 8]
    assert found[0] == found[1]
    assert found[0]["to_teacher"] is None
    assert run(evaluate, "--checkpoint", *workshop["published"][1:], *out) == 0
    (row,) = [row for row in rows_of(tmp_path) if row["name"] == "tiny-2-steps"]
    assert row["to_teacher"] > 0
    assert row["to_base"] == found[0]["to_base"]
    assert 0 <= row["teachers_class"] <= 1
    of_teacher = ("to_teacher", "teachers_class")
    same = {k: v for k, v in row.items() if k not in of_teacher}
    assert same == {k: v for k, v in found[0].items() if k not in of_teacher}


def test_other_real_images_are_refused_before_drawing(workshop, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    others = RealImages(*(torch.zeros(100, 1, 32, 32, dtype=torch.uint8) for _ in range(3)))
    monkeypatch.setattr("evaluation.gallery.real_images", lambda config: others)
    monkeypatch.setattr(SampleRequest, "draw", lambda *a: pytest.fail("drawn"))
    again = ("--checkpoint", workshop["published"][0], "--steps", 3, "--output", folder)
    assert run(evaluate, *again) == 2
    assert "measured against other real images; give another" in capsys.readouterr().err


def test_a_student_belongs_to_the_base_model_of_its_own_run(workshop):
    base, _, student = (load_checkpoint(path) for path in workshop["published"])
    longer = replace(base, name="another", update=base.update + 1)
    made = {Path("a"): base, Path("b"): longer, Path("c"): student}
    jobs = plan_jobs(made, ["ddim"], [8], 100, None)
    assert Partners.of(jobs[2], jobs).base is jobs[0]
    later = replace(base, update=base.update + 1)
    jobs = plan_jobs({**made, Path("d"): later}, ["ddim"], [8], 100, None)
    assert Partners.of(jobs[2], jobs).base is jobs[3]
    wider = student.config.model.model_copy(update={"channels": 64})
    for its_own in (None, wider):
        recipe = student.config.distillation.model_copy(update={"student": its_own})
        config = student.config.model_copy(update={"model": wider, "distillation": recipe})
        other = replace(student, config=config, name="a third")
        jobs = plan_jobs({**made, Path("e"): other}, ["ddim"], [8], 100, None)
        found = Partners.of(jobs[3], jobs).base
        assert found is (jobs[1] if its_own else None), "a student may have a network of its own"


def test_images_from_elsewhere(workshop, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", pixels)
    (tmp_path / "pngs").mkdir()
    for n, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(tmp_path / "pngs" / f"{n:02d}.png")
    images = ("--images", tmp_path / "made.npz", tmp_path / "pngs")
    out = ("--config_path", workshop["config"], "--output", tmp_path / "out")
    assert run(evaluate, *images, *out) == 0
    rows = {row["name"]: row for row in rows_of(tmp_path / "out")}
    for key in ("count", "frechet", "kernel", "precision", "confident", "classes"):
        assert rows["made"]["quality"][key] == pytest.approx(rows["pngs"]["quality"][key], rel=1e-4)
    assert rows["made"]["quality"]["frechet"] > 3 * rows["real images"]["quality"]["frechet"]
    with Image.open(tmp_path / "out" / "nearest-made.png") as picture:
        of_twelve = picture.size
    np.savez(tmp_path / "made.npz", pixels[:10])
    assert run(evaluate, *images, *out) == 0
    counts = {row["name"]: row["quality"]["count"] for row in rows_of(tmp_path / "out")}
    assert (counts["made"], counts["pngs"]) == (10, 20), "a file's row is of what it holds now"
    with Image.open(tmp_path / "out" / "nearest-made.png") as picture:
        assert picture.height == of_twelve[1], "a row of samples, and one of training images"
        assert picture.width < of_twelve[0]
    monkeypatch.setattr(Comparison, "row_of_files", lambda *_: 1 / 0)
    assert run(evaluate, *images, *out) == 0, "nothing is measured twice"


def test_sorted_images_from_elsewhere_are_measured_as_any(workshop, tmp_path):
    """As a folder with one of each class below it has them: its parts must stand for all."""
    images, labels = read_mnist(Path(__file__).parents[1] / "data" / "mnist", "t10k")
    images = np.pad(images[:1000].numpy(), ((0, 0), (2, 2), (2, 2)))[..., None]
    np.savez(tmp_path / "mixed.npz", images)
    np.savez(tmp_path / "sorted.npz", images[labels[:1000].argsort().numpy()])
    given = ("--images", tmp_path / "mixed.npz", tmp_path / "sorted.npz")
    out = ("--config_path", workshop["config"], "--output", tmp_path / "out")
    assert run(evaluate, *given, *out) == 0
    found = {row["name"]: row["quality"] for row in rows_of(tmp_path / "out")}
    assert found["sorted"]["frechet"] == pytest.approx(found["mixed"]["frechet"], rel=1e-4)
    assert found["sorted"]["frechet_interval"] < 3 * found["mixed"]["frechet_interval"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((), "--checkpoint: give checkpoints, or --images with --config_path"),
        (("--checkpoint", "{0}", "--count", 5), "at least 10"),
        (("--checkpoint", "{0}", "--steps", 1024, "--max_calls", 2000), "leave 1 images at 1024"),
        (("--checkpoint", "{0}", "--steps", 0), "--steps 0: take a whole number"),
        (("--checkpoint", "{0}", "--sampler", "ddim", "euler"), "euler"),
        (("--checkpoint", "{0}", "--features", "vgg"), "not one of digits, inception"),
        (("--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        (("--checkpoint", "{0}", "--images", "none.npz"), "none.npz: no such file"),
    ],
)
def test_bad_arguments(workshop, tmp_path, capsys, arguments, hint):
    given = [str(a).format(workshop["made"][0]) for a in arguments]
    capsys.readouterr()
    assert run(evaluate, *given, "--output", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert hint in errors[0]
    assert not (tmp_path / "out").exists()


def test_other_noise_is_measured_anew_and_equal_names_are_refused(workshop, tmp_path, capsys):
    out = tmp_path / "out"
    common = ("--checkpoint", workshop["published"][2], "--count", 20, "--output", out)
    distances = []
    for seed in (0, 1):
        assert run(evaluate, *common, "--seed", seed) == 0
        distances.append([r["quality"]["frechet"] for r in rows_of(out) if r["kind"] != "floor"])
    assert distances[0] != distances[1]
    of_another_run = replace(load_checkpoint(workshop["published"][2]), name="another")
    twin = tmp_path / workshop["published"][2].name
    publish_checkpoint(twin, of_another_run, half=False)
    assert run(evaluate, "--checkpoint", twin, *common[1:]) == 0
    runs = [row["run"] for row in rows_of(out) if row["kind"] == "student"]
    assert sorted(runs) == ["another", "tiny"]
    assert "| another | tiny-2-steps |" in (out / "results.md").read_text()
    shutil.copy(workshop["published"][2], twin)
    assert run(evaluate, "--checkpoint", twin, workshop["published"][2], "--output", out) == 2
    assert "tiny-2-steps: two of this name" in capsys.readouterr().err
    assert run(publish, "--checkpoint", twin, twin, "--name", "x", "--output", tmp_path) == 2


def test_the_data_set_may_lie_elsewhere(workshop, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(workshop["measured"], tmp_path / "again")
    command = (*workshop["command"][:-1], folder)
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mnist").symlink_to(Path("data/mnist").resolve())
    monkeypatch.chdir(tmp_path)
    assert run(evaluate, *command) == 2
    assert "data/mnist" in capsys.readouterr().err
    assert run(evaluate, *command, "--data_root", tmp_path / "sets") == 0


def test_real_images_of_a_folder_are_two_sets_of_different_ones(tmp_path, monkeypatch):
    for n in range(101):
        Image.new("L", (32, 32), n).save(tmp_path / f"{n}.png")
    config = make_config(tiny(data={"name": "image_folder", "root": str(tmp_path)}), "x")
    asked, read = [], type(build_dataset(config, CPU)).batches
    monkeypatch.setattr("evaluation.gallery.CHUNK", 30)

    def recorded(self, batches):
        parts = list(batches)
        asked.extend(map(len, parts))
        return read(self, parts)

    monkeypatch.setattr(type(build_dataset(config, CPU)), "batches", recorded)
    real = real_images(config)
    assert asked == [30, 30, 30, 10], "what the workers hand over at once is not large"
    values = [images[:, 0, 0, 0].tolist() for images in (real.reference, real.floor)]
    assert len(values[0]) == len(values[1]) == 50
    assert len({*values[0], *values[1]}) == 100
    assert values[0] != sorted(values[0])
    assert real.training is None
    for n in (0, 1):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(InputError, match="99 images; to compare takes at least 100"):
        real_images(config)


def test_real_images_are_in_no_order():
    real = real_images(make_config(tiny(), "x"))
    again = real_images(make_config(tiny(), "x"))
    assert torch.equal(real.reference, again.reference)
    images, _ = read_mnist(Path(__file__).parents[1] / "data" / "mnist", "t10k")
    assert not torch.equal(real.reference[0, 0, 2:-2, 2:-2], images[0])
    assert real.reference.long().sum() == images.long().sum()


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((20, 28, 28, 1), "takes (N, 32, 32, 1)"), ((9, 32, 32, 1), "9 images; to measure takes")],
)
def test_images_that_do_not_fit(workshop, tmp_path, capsys, shape, hint):
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    given = ("--images", tmp_path / "x.npz", "--config_path", workshop["config"])
    assert run(evaluate, *given, "--output", tmp_path / "out") == 2
    assert hint in capsys.readouterr().err


def test_a_missing_folder_of_images_is_named(workshop, tmp_path, capsys):
    given = ("--images", tmp_path / "none", "--config_path", workshop["config"])
    assert run(evaluate, *given, "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'none'}: no such folder (--images)" in capsys.readouterr().err


def test_colour_images_go_through_the_whole_chain(tmp_path):
    config = tmp_path / "colours.yaml"
    data = {"name": "colored_mnist", "channels": 3}
    config.write_text(yaml.safe_dump(tiny(data=data, sampling={"steps": 4})))
    assert run(train, "--config_path", config, "--output", tmp_path / "base") == 0
    teacher = tmp_path / "base" / "diffusion-4.pt"
    assert load_checkpoint(teacher).weights["conv_in.weight"].shape[1] == 3 * 4 * 4  # patches
    ladder = tmp_path / "ladder"
    assert run(distill, "--teacher_model_checkpoint", teacher, "--output", ladder) == 0
    student = ladder / "student-2.pt"
    for path in (teacher.with_suffix(".png"), student.with_suffix(".png")):
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            red, green, _ = np.asarray(picture).transpose(2, 0, 1)
            assert (red != green).any()
    file = tmp_path / "made.npz"
    assert run(sample, "--checkpoint", student, "--count", 20, "--output", file) == 0
    with np.load(file) as arrays:
        assert arrays["arr_0"].shape == (20, 32, 32, 3)
    out = tmp_path / "out"
    given = ("--checkpoint", teacher, student, "--steps", 4, "--count", 20, "--images", file)
    assert run(evaluate, *given, "--output", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["features"] == "digits"
    assert results["reference"]["confident"] > 0.97, "a digit of any colour is as clear as a white"
    assert {row["kind"] for row in results["rows"]} == {"floor", "images", "base", "student"}
    made = {row["name"]: row["quality"]["frechet"] for row in results["rows"]}
    assert made["made"] == pytest.approx(made["student-2"]), "the same images"


# --- published weights ----------------------------------------------------------------------------


def test_published_weights_are_the_ones_to_sample_with(workshop):
    for made, published in zip(workshop["made"], workshop["published"], strict=True):
        before, after = load_checkpoint(made), load_checkpoint(published)
        assert (after.kind, after.num_steps, after.stage) == (
            before.kind,
            before.num_steps,
            before.stage,
        )
        assert after.config == before.config
        assert after.ema is None
        for name, value in before.weights.items():
            assert after.weights[name].dtype == torch.float32
            torch.testing.assert_close(after.weights[name], value, rtol=1e-3, atol=1e-6)
        assert published.stat().st_size < 0.55 * made.stat().st_size
    teacher, _, student = (load_checkpoint(p) for p in workshop["published"])
    parent = load_checkpoint(workshop["published"][1])
    assert student.lineage["teacher"] == digest(parent.weights)
    assert parent.lineage["teacher"] == digest(teacher.weights)


def test_published_weights_are_sampled_and_distilled_from(workshop, tmp_path, capsys):
    student = workshop["published"][2]
    assert run(sample, "--checkpoint", student, "--output", tmp_path / "x.png") == 0
    assert "2 steps of ddim" in capsys.readouterr().out
    one_stage = ("--initial_sampling_steps", 1, "--distillation_iterations", 1)
    ladder = ("--teacher_model_checkpoint", student, *one_stage)
    assert run(distill, *ladder, "--output", tmp_path / "ladder") == 0
    assert (tmp_path / "ladder" / "student-1.pt").exists()


def test_damaged_published_weights_are_refused(workshop, tmp_path, capsys):
    whole = workshop["published"][0].read_bytes()
    path = tmp_path / "x.safetensors"
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    renamed = whole.replace(b"cosine", b"linear")
    for data in (whole[:-10], bytes(flipped), renamed, b"", b"{}"):
        assert data != whole
        path.write_bytes(data)
        assert run(sample, "--checkpoint", path) == 2
        assert "x.safetensors: " in capsys.readouterr().err
