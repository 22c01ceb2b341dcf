"""Checkpoints whose levels are a table, as those of an imported scheduler, with a small UNet."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import distill
import sample
import train
from diffusion.betas import BETAS, grid_of_betas
from evaluation.jobs import plan_jobs
from pipeline.build import build_network
from pipeline.checkpoint import Checkpoint, digest, load_checkpoint, publish_checkpoint
from pipeline.config import make_config
from pipeline.network import build_schedule
from tests.commands import refused, run, write_config
from tests.toys import tiny
from training.ladder import reference_steps
from utils.command import InputError

TABLE = tuple(grid_of_betas(BETAS["squaredcos_cap_v2"](20, 0.0, 0.0)).tolist())
DIFFUSION = {"schedule": "table", "prediction": "eps"}


def base_of(**sections):
    config = make_config(tiny(diffusion=DIFFUSION, **sections), "x.yaml")
    torch.manual_seed(0)
    weights = build_network(config, torch.device("cpu")).state_dict()
    weights["conv_out.weight"].normal_(0.0, 0.02)
    return Checkpoint(
        kind="base", name="t", config=config, update=0, stage=0, model=weights, grid=TABLE
    )


@pytest.fixture
def path(tmp_path):
    publish_checkpoint(tmp_path / "t.safetensors", base_of(), half=False)
    return tmp_path / "t.safetensors"


def test_a_base_model_keeps_its_table(path):
    checkpoint = load_checkpoint(path)
    assert checkpoint.grid == TABLE
    assert checkpoint.num_steps is None
    assert checkpoint.sampler is None
    assert len(checkpoint.levels()) == 9, "sampling.steps"
    assert checkpoint.levels(20).tolist() == list(TABLE)
    assert checkpoint.levels(5).tolist() == [TABLE[n] for n in (0, 4, 8, 12, 16, 20)]
    assert checkpoint.levels(1).tolist() == [TABLE[0], math.inf]
    # index T - round(t T), half to even, at t = 3/3, 2/3, 1/3, 0
    assert checkpoint.levels(3).tolist() == [TABLE[n] for n in (0, 7, 13, 20)]
    with pytest.raises(InputError, match="21 steps: this checkpoint has a table of 20 noise"):
        checkpoint.levels(21)


def test_only_a_consistency_student_without_a_table_has_no_steps_of_its_own(path, tmp_path):
    """Of a table a student keeps the levels of its own steps alone."""
    method = ("distillation.method=consistency", "distillation.ema_decay=0.9")
    settings = ("distillation.ladder=[20,2]", *method)
    (student,) = distilled(path, tmp_path / "out", *settings)
    assert (student.sampler, student.own_steps) == ("consistency", 2)
    of_schedule = replace(student, config=make_config(tiny(), "x.yaml"))
    assert of_schedule.own_steps is None
    assert replace(of_schedule, sampler="ddim").own_steps == 2
    (job,) = plan_jobs({path: student}, ["ddim"], [8], 100, None)
    assert job.steps == 2


def test_a_table_belongs_to_a_config_that_says_so():
    base = base_of()
    with pytest.raises(ValidationError, match=r"grid: missing, where diffusion\.schedule is table"):
        replace(base, grid=None)
    cosine = make_config(tiny(), "x.yaml")
    with pytest.raises(ValidationError, match="a base model has stage 0 and neither of the others"):
        replace(base, config=cosine)
    for wrong in ({"sampler": "ddim"}, {"stage": 1}, {"kind": "student"}):
        with pytest.raises(ValidationError, match="num_steps 20"):
            replace(base, **wrong)
    with pytest.raises(InputError, match=r"^diffusion.schedule: table: .* take cosine$"):
        build_schedule(base.config)


def test_nothing_is_trained_on_a_table(tmp_path, capsys):
    config = write_config(tmp_path, diffusion=DIFFUSION)
    line = refused(capsys, train, "--config_path", config, "--output", tmp_path / "out")
    assert "diffusion.schedule: table: the levels of an imported checkpoint" in line
    assert not (tmp_path / "out").exists()


def distilled(path, output, *settings):
    common = ("--teacher_model_checkpoint", path, "--output", output, "--set", *settings)
    assert run(distill, *common) == 0
    return [load_checkpoint(file) for file in sorted(output.glob("student-*.pt"))]


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        (["ladder=[20,10,5]"], {10: range(0, 21, 2), 5: range(0, 21, 4)}),
        (["ladder=[20,20]", "prediction=v"], {20: range(21)}),
        (["ladder=[6,3]"], {3: (0, 7, 13, 20)}),
        (["ladder=[20,3]", "grid=[1.0, 0.9, 0.5, 0.0]"], {3: (0, 2, 10, 20)}),
        (["ladder=[20,6]", "grid=adaptive"], {6: None}),
        (["ladder=[20,4]", "method=tract", "ema_decay=0.9"], {4: range(0, 21, 5)}),
    ],
    ids=["progressive", "match", "not all levels", "times", "adaptive", "tract"],
)
def test_a_ladder_takes_its_levels_from_the_table(settings, at, path, tmp_path):
    settings = [f"distillation.{setting}" for setting in settings]
    students = distilled(path, tmp_path / "out", *settings)
    assert {student.num_steps for student in students} == at.keys()
    for student in students:
        assert set(student.grid) <= set(TABLE)
        if (wanted := at[student.num_steps]) is not None:
            assert student.grid == tuple(TABLE[n] for n in wanted)
        into = "v" if "distillation.prediction=v" in settings else "eps"
        assert student.config.diffusion.prediction == into
        assert student.config.diffusion.schedule == "table"
    drawn = ("--checkpoint", tmp_path / "out" / f"student-{min(at)}.pt", "--output")
    assert run(sample, *drawn, tmp_path / "x.png") == 0
    if students[0].num_steps == 10:
        few = students[0].levels(5).tolist()
        assert few == list(students[1].grid), "levels of its own"


def test_times_that_fall_on_one_level_are_refused(path, tmp_path, capsys):
    settings = ("distillation.ladder=[20,3]", "distillation.grid=[1.0, 0.99, 0.5, 0.0]")
    common = ("--teacher_model_checkpoint", path, "--output", tmp_path / "out", "--set")
    assert "distillation.grid: 3 steps on a grid of 20" in refused(
        capsys, distill, *common, *settings
    )


def test_more_steps_than_levels_are_refused(path, tmp_path, capsys):
    common = ("--teacher_model_checkpoint", path, "--output", tmp_path / "out")
    line = refused(capsys, distill, *common, "--set", "distillation.ladder=[40,20]")
    assert f"{path}: has 20 noise levels, but is asked for 40 steps" in line
    line = refused(capsys, sample, "--checkpoint", path, "--steps", 21)
    assert "21 steps: this checkpoint has a table of 20 noise levels" in line


def test_the_reference_is_no_finer_than_the_table():
    base = base_of(sampling={"steps": 1024})
    assert reference_steps(base, base.config) == 20


def test_eps_students_of_a_table_without_signal_are_warned_of(path, tmp_path, capsys):
    # 1/alpha of the last of 20 squared-cosine levels
    largest = (1 + math.exp(-TABLE[0])) ** 0.5
    output = ("--output", tmp_path / "out", "--print_config")
    common = ("--teacher_model_checkpoint", path, *output, "--set", "distillation.ladder=[20,10]")
    assert run(distill, *common) == 0
    said = capsys.readouterr().err
    assert f"the error of x_hat is {largest:.0f} times that of eps" in said
    assert "distillation.prediction=v distillation.ladder=[20,20,..]" in said
    assert run(distill, *common, "distillation.prediction=v") == 0
    assert "x_hat" not in capsys.readouterr().err


def test_students_may_predict_something_else_without_a_table(tmp_path):
    """A v teacher, a student of both outputs: the last layer begins anew, all else is copied."""
    config = write_config(tmp_path)
    assert run(train, "--config_path", config, "--output", tmp_path / "base") == 0
    base = tmp_path / "base" / "diffusion-4.pt"
    settings = ("distillation.prediction=both", "distillation.learning_rate=1e-12")
    student = distilled(base, tmp_path / "out", *settings)[-1]
    assert student.config.diffusion.prediction == "both"
    before = load_checkpoint(base).weights
    for name, tensor in student.model.items():
        if name.startswith("conv_out"):
            assert tensor.shape[0] == 2 * before[name].shape[0]
        else:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-8)
    assert digest(student.model) != digest(before)
