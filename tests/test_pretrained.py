"""The published weights: whole, small, drawing digits, and as good as README says."""

from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
from evaluation.features import make_extractor
from evaluation.gallery import Gallery
from evaluation.quality import background, class_shares, confident_share
from evaluation.results import finest_base, read_results
from evaluation.tables import markdown, summary, write_results
from pipeline.api import load_sampler
from pipeline.checkpoint import digest, load_checkpoint
from pipeline.sections import EngineConfig
from utils.processes import World

ROOT = Path(__file__).parents[1]
PRETRAINED = ROOT / "pretrained"
TEACHER = PRETRAINED / "mnist-teacher.safetensors"


def students(name, *steps):
    """Their files, by steps."""
    return {n: PRETRAINED / f"{name}-{n}-step{'s' * (n > 1)}.safetensors" for n in steps}


PATHS = students("mnist", 8, 4, 2, 1)
TRACT = students("mnist-tract", 8, 4, 2, 1)
ADVERSARIAL = students("mnist-adversarial", 8, 4, 2, 1)
HALF_WIDTH = students("mnist-half-width", 8, 1)
BY_CLASS = students("mnist-by-class", 8, 1)


@pytest.fixture(scope="module")
def results():
    found = read_results(ROOT / "docs" / "mnist" / "results.json")
    assert found is not None
    return found


def row_of(results, path, steps, count):
    wanted = (path.stem, "ddim", steps, 0.0, count)
    return next(row for row in results.rows if row.key[1:] == wanted)


def test_the_files_are_small_and_the_students_one_ladder():
    groups = (PATHS, TRACT, ADVERSARIAL, HALF_WIDTH, BY_CLASS)
    named = {path for group in groups for path in group.values()}
    named |= {TEACHER, PRETRAINED / "mnist-by-class-teacher.safetensors"}
    assert named == set(PRETRAINED.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) <= 60e6
    assert all(load_checkpoint(path).config.engine == EngineConfig() for path in named)
    base = load_checkpoint(TEACHER)
    assert (base.kind, base.num_steps, base.stage) == ("base", None, 0)
    before = None
    for steps, path in PATHS.items():
        student = load_checkpoint(path)
        assert (student.kind, student.num_steps) == ("student", steps)
        assert (student.config.model, student.name) == (base.config.model, base.name)
        assert steps == 8 or student.lineage["teacher"] == before
        before = digest(student.weights)
    for path in HALF_WIDTH.values():
        student = load_checkpoint(path)
        assert student.config.model.channels * 2 == base.config.model.channels
        assert path.stat().st_size < 0.3 * TEACHER.stat().st_size


def test_the_guided_students_draw_the_digit_that_is_asked_for():
    labels = [n % 10 for n in range(50)]
    base = load_checkpoint(PRETRAINED / "mnist-by-class-teacher.safetensors")
    assert (base.kind, base.config.model.num_classes) == ("base", 10)
    features = make_extractor("digits", torch.device("cpu"))
    for steps, share in ((8, 0.96), (1, 0.9)):
        path = BY_CLASS[steps]
        assert load_checkpoint(path).config.model.guidance
        drawn = load_sampler(path)(50, seed=0, labels=labels, guidance=1.0)
        right = features(drawn).logits.argmax(1) == torch.tensor(labels)
        assert right.float().mean() >= share


BACKGROUND = {  # the most of quality.background: the share of faint pixels, and the border
    **dict.fromkeys([*PATHS.values(), *TRACT.values()], (0.05, 0.1)),
    **dict.fromkeys(ADVERSARIAL.values(), (0.15, 0.4)),
    HALF_WIDTH[8]: (0.05, 0.1),
    HALF_WIDTH[1]: (0.12, 1.5),
    **dict.fromkeys(BY_CLASS.values(), (0.05, 0.1)),
}


@pytest.mark.parametrize("path", BACKGROUND, ids=lambda path: path.stem)
def test_the_students_draw_digits_on_black(path):
    student, base = load_checkpoint(path), load_checkpoint(TEACHER)
    assert student.config.diffusion == base.config.diffusion
    assert student.config.diffusion.clip
    drawn = load_sampler(path)(64, seed=0)
    features = make_extractor("digits", torch.device("cpu"))
    assert confident_share(features(drawn).logits) > 0.75
    for found, most in zip(background(drawn), BACKGROUND[path], strict=True):
        assert found < most  # digits' edges alone are a share of 0.015


@pytest.mark.parametrize("steps", list(ADVERSARIAL))
def test_with_the_adversarial_term_students_are_nearer_to_the_data(results, steps):
    """By the stored results, from the same noise; and no fewer of the real images are near them."""
    before = TRACT if steps > 1 else PATHS
    with_term, without = (
        row_of(results, paths[steps], steps, 5000) for paths in (ADVERSARIAL, before)
    )
    assert with_term.quality.frechet < 0.85 * without.quality.frechet
    assert with_term.quality.recall > without.quality.recall - 0.03
    assert with_term.quality.confident > without.quality.confident - 0.01
    student, close = load_checkpoint(ADVERSARIAL[steps]), 3.0 if steps > 1 else 0.3
    assert student.config.distillation.losses == {"snr_trunc": close, "adversarial": 0.3}


def test_students_with_the_term_are_nearer_to_the_data_than_the_teachers_64(results):
    teacher = row_of(results, TEACHER, 64, 5000)
    for steps, path in ADVERSARIAL.items():
        student = row_of(results, path, steps, 5000)
        assert student.quality.frechet < teacher.quality.frechet
        assert student.quality.recall > teacher.quality.recall - 0.03


@pytest.mark.parametrize("steps", list(TRACT))
def test_tract_straight_from_the_teacher_is_better_than_the_ladder(results, steps):
    """By the stored results, from the same noise. That of one step halves the one of two."""
    straight, ladder = (row_of(results, paths[steps], steps, 5000) for paths in (TRACT, PATHS))
    assert straight.quality.frechet < 0.9 * ladder.quality.frechet
    student, teacher = load_checkpoint(TRACT[steps]), TRACT[2] if steps == 1 else TEACHER
    recipe = student.config.distillation
    assert recipe.method == ("progressive" if steps == 1 else "tract")
    assert recipe.steps() == (2 if steps == 1 else 128, steps)
    assert student.lineage["teacher"] == digest(load_checkpoint(teacher).weights)


def test_sample_py_draws_digits_of_the_eight_step_student(tmp_path):
    path, out = str(PATHS[8]), tmp_path / "digits.npz"
    assert sample.main(["--checkpoint", path, "--count", "100", "--output", str(out)]) == 0
    images = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2)
    logits = make_extractor("digits", torch.device("cpu"))(images).logits
    assert confident_share(logits) > 0.75
    assert all(share > 0 for share in class_shares(logits))


def test_the_stored_tables_are_those_of_the_stored_results(results, tmp_path):
    write_results(tmp_path, results)
    for name in ("results.md", "results.csv", "results.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "mnist" / name).read_text()
    titles, _, *rows = (
        [cell.strip() for cell in line[1:-1].split("|")] for line in markdown(results).splitlines()
    )
    shown, quality = dict(zip(titles, rows[-1], strict=True)), results.rows[-1].quality
    assert shown["precision"] == f"{quality.precision:.3f}"
    assert shown["recall"] == f"{quality.recall:.3f}"


def test_readme_and_the_page_show_the_stored_results(results):
    table = summary(results)
    assert table.count("\n") > len(PATHS)
    assert table in (ROOT / "README.md").read_text()
    assert table in (ROOT / "docs" / "mnist" / "results.md").read_text()


def test_the_stored_results_are_of_the_published_weights(results):
    named = [TEACHER, *PATHS.values(), *TRACT.values(), *ADVERSARIAL.values(), *HALF_WIDTH.values()]
    published = {path.stem: load_checkpoint(path) for path in named}
    gallery = Gallery(Path(), World(torch.device("cpu")), seed=0, batch_size=1)
    ours = [row for row in results.rows if row.kind in ("base", "student")]
    assert {row.name for row in ours} == set(published)
    for row in ours:
        assert row.source == gallery.key(published[row.name], row.sampler, row.steps)


def test_no_model_is_surely_better_than_real_images_and_one_undistilled_step_is_the_worst(results):
    floors = {row.quality.count: row.quality.frechet for row in results.rows if row.kind == "floor"}
    models = [row for row in results.rows if row.kind in ("base", "student")]
    for model in models:  # 1024 ancestral steps are as near as real images
        quality = model.quality
        assert quality.frechet + quality.frechet_interval > floors[quality.count], model.key
    count = finest_base(results).quality.count
    ours = [row for row in models if row.quality.count == count and row.sampler == "ddim"]
    assert {row.kind for row in ours} == {"base", "student"}
    worst = max(ours, key=lambda row: row.quality.frechet)
    assert (worst.kind, worst.steps) == ("base", 1)


def test_the_teacher_draws_clear_digits_of_all_classes_as_often_as_they_are(results):
    teacher, real = finest_base(results).quality, results.reference
    assert teacher.confident >= 0.85 * real["confident"]
    shares = [ours / theirs for ours, theirs in zip(teacher.classes, real["classes"], strict=True)]
    assert len(shares) == 10
    assert 2 / 3 <= min(shares) <= max(shares) <= 4 / 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 1])
def test_a_student_measured_anew_is_as_good_as_the_results_say(results, steps, tmp_path):
    count = finest_base(results).quality.count
    command = ["--checkpoint", str(PATHS[steps]), "--count", str(count), "--output", str(tmp_path)]
    assert evaluate.main(command) == 0
    anew = read_results(tmp_path / "results.json")
    assert anew is not None
    now = row_of(anew, PATHS[steps], steps, count).quality
    said = row_of(results, PATHS[steps], steps, count).quality
    assert abs(now.frechet - said.frechet) <= said.frechet_interval
    assert abs(now.confident - said.confident) <= 0.01
