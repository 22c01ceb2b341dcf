"""Every method of distillation through the command line: run, sampled, killed and resumed."""

import os
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import distill
import sample
import train
from diffusion.distillation import METHODS, distillation_loss
from diffusion.gaussian import conditioned
from diffusion.grids import uniform_grid
from diffusion.losses import weighted_sum
from evaluation.comparison import plan_jobs
from evaluation.gallery import Gallery
from models.unet import UNet
from pipeline.build import build_dataset, build_denoiser
from pipeline.checkpoint import digest, load_checkpoint
from pipeline.config import make_config
from pipeline.data import open_dataset
from pipeline.network import build_network, build_schedule, load_weights
from pipeline.sampling import SampleRequest
from tests.toys import tiny
from training.folder import open_folder
from training.stage import student_stages
from training.stages import Run, make_objective, student_start, teacher_grid, train_stage
from training.trainee import Trainee, make_trainee
from utils.processes import World

ROOT = Path(__file__).parents[1]
ALONE = World(torch.device("cpu"))

SMALL = {**tiny()["model"], "channels": 4}
LABELS = {"num_classes": 10}
DISTILLATION = {"updates_per_stage": 4, "batch_size": 8, "checkpoint_every": 2}
AVERAGE = {"ema_decay": 0.9}

# Each: the section distillation of its config. Those named guided have a teacher with classes.
LADDERS = {
    "progressive": {"ladder": [8, 4, 2]},
    "uneven ratios": {"ladder": [12, 4, 2, 1]},
    "straight": {"ladder": [8, 1]},
    "match": {"ladder": [8, 8, 4]},
    "times": {"ladder": [8, 3], "grid": [1.0, 0.75, 0.25, 0.0]},
    "adaptive": {"ladder": [8, 3, 2], "grid": "adaptive"},
    "tract": {"ladder": [8, 4, 1], "method": "tract", **AVERAGE},
    "consistency, 1 step": {"ladder": [8, 1], "method": "consistency", **AVERAGE},
    "consistency, 2 steps": {"ladder": [8, 2], "method": "consistency", **AVERAGE},
    "one method a stage": {
        "ladder": [8, 4, 2, 1],
        "method": ["progressive", "tract", "consistency"],
        **AVERAGE,
    },
    "losses": {
        "ladder": [8, 4],
        "losses": {"snr_trunc": 1.0, "energy": 0.3, "perceptual": 0.1},
    },
    "pull": {"ladder": [8, 4], "pull": 0.1},
    "guided": {"ladder": [8, 8, 4], "guidance": [0.0, 4.0]},
    "smaller": {"ladder": [8, 8, 4], "student": SMALL},
    "guided, smaller, tract": {
        "ladder": [8, 8, 2],
        "guidance": [0.0, 4.0],
        "method": ["progressive", "tract"],
        "student": {**SMALL, **LABELS},
        **AVERAGE,
    },
}


def main(script, *arguments):
    return script.main([str(a) for a in arguments])


def write_config(path, name="progressive", **distillation):
    """A config of this ladder, with the classes of a guided one."""
    values = tiny(sampling={"steps": 8, "grid": 2})
    values["distillation"] = {**DISTILLATION, **LADDERS[name], **distillation}
    if name.startswith("guided"):
        values["model"] |= LABELS
        values["training"] |= {"label_dropout": 0.1}
    path.write_text(yaml.safe_dump(values))
    return path


def refused(capsys, script, *arguments):
    """The one line that the script says, with exit code 2."""
    capsys.readouterr()
    assert main(script, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    return said[-1]


@pytest.fixture(scope="module", autouse=True)
def _no_more_than_the_method():
    """MNIST is read once, and no plots are drawn; other tests look at those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.build.open_dataset", cache(open_dataset))
        patch.setattr("evaluation.curves.draw_loss_curve", lambda folder: None)
        patch.setattr("evaluation.report.draw_pictures", lambda *arguments: None)
        patch.setattr("evaluation.report.NUM_IMAGES", 2)
        patch.setattr("evaluation.report.CHUNK", 2)
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Base models: of plain ladders, and with classes of guided ones."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for name in ("progressive", "guided"):
        config = write_config(folder / f"{name}.yaml", name)
        assert main(train, "--config_path", config, "--output", folder / name) == 0
        found[name] = folder / name / "diffusion-4.pt"
    return found


def teacher_of(name, teachers):
    return teachers["guided" if name.startswith("guided") else "progressive"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Steps:
    """The digests of all that changes in training, by stage and update.

    Raises Killed after the update kill_at, counted over all stages.
    """

    def __init__(self, monkeypatch, kill_at=None):
        self.digests, self.done, self.kill_at = {}, 0, kill_at
        self.averages = set()
        step = Trainee.step

        def noted(trainee, stage, rate):
            step(trainee, stage, rate)
            self.done += 1
            state = {name: value for name, value in trainee.state().items() if name != "update"}
            self.digests[stage.number, trainee.update + 1] = digest(state)
            if state["ema"] is not None:
                self.averages.add(("ema", stage.number))
            if state["walker"] is not None:
                self.averages.add(("walker", stage.number))
            if self.done == self.kill_at:
                raise Killed

        monkeypatch.setattr(Trainee, "step", noted)


def run_ladder(folder, name, teachers, monkeypatch, kill_at=None):
    """Distils into folder/ladder; returns its steps."""
    config = write_config(folder / "tiny.yaml", name)
    command = ("--config_path", config, "--teacher_model_checkpoint", teacher_of(name, teachers))
    with monkeypatch.context() as patch:
        steps = Steps(patch, kill_at)
        if kill_at is None:
            assert main(distill, *command, "--output", folder / "ladder") == 0
        else:
            with pytest.raises(Killed):
                main(distill, *command, "--output", folder / "ladder")
    return steps


@pytest.fixture(scope="module")
def ladders(tmp_path_factory, teachers):
    """Runs a ladder undisturbed, once; gives its folder and its steps."""
    made = {}

    def ladder(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("ladder")
            with pytest.MonkeyPatch.context() as patch:
                made[name] = folder / "ladder", run_ladder(folder, name, teachers, patch)
        return made[name]

    return ladder


def students(folder, name):
    return {n: load_checkpoint(folder / f"student-{n}.pt") for n in LADDERS[name]["ladder"][1:]}


# --- every ladder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDERS)
def test_a_ladder_gives_students_of_the_grids_and_samplers_asked_for(name, ladders, teachers):
    folder, steps = ladders(name)
    recipe = make_config({"distillation": LADDERS[name]}, "here").distillation if (
        not name.startswith("guided")
    ) else load_checkpoint(next(folder.glob("student-*.pt"))).config.distillation
    before = load_checkpoint(teacher_of(name, teachers))
    above = uniform_grid(build_schedule(before.config), recipe.steps()[0])
    for position, (num_steps, student) in enumerate(students(folder, name).items()):
        method = METHODS[recipe.of_stage(position)["method"]]
        assert student.num_steps == num_steps
        assert student.stage == position + 1
        assert student.sampler == method.sampler
        assert student.config.distillation.ladder == tuple(LADDERS[name]["ladder"])
        assert student.lineage == {"teacher": digest(before.weights)}
        assert (student.ema is not None) == (recipe.ema_decay is not None)
        assert (("walker", student.stage) in steps.averages) == method.needs_average
        assert student.walker is None
        assert student.optimizer is None
        grid = student.levels()
        if recipe.grid == "uniform":
            assert torch.equal(grid, uniform_grid(build_schedule(student.config), num_steps))
        elif recipe.grid != "adaptive":
            times = torch.tensor(recipe.grid[:-1], dtype=torch.float64)
            assert torch.equal(grid[:-1], build_schedule(student.config)(times))
        assert set(grid.tolist()) <= set(above.tolist()), "its levels are some of its teacher's"
        before, above = student, grid
    assert sorted(p.name for p in folder.glob("*.pt")) == sorted(
        f"student-{n}.pt" for n in recipe.steps()[1:]
    )


@pytest.mark.parametrize("name", LADDERS)
def test_a_killed_ladder_goes_on_as_if_nothing_had_happened(
    name, ladders, teachers, tmp_path, monkeypatch
):
    """Bit-identical: every update done again, averages, walker and optimiser, and every file."""
    folder, undisturbed = ladders(name)
    stages = len(LADDERS[name]["ladder"]) - 1
    killed = run_ladder(tmp_path, name, teachers, monkeypatch, kill_at=4 * (stages // 2) + 3)
    resumed = run_ladder(tmp_path, name, teachers, monkeypatch)
    assert len(resumed.digests) < len(undisturbed.digests)
    assert killed.digests.items() <= undisturbed.digests.items()
    assert resumed.digests.items() <= undisturbed.digests.items()
    for num_steps, student in students(folder, name).items():
        other = load_checkpoint(tmp_path / "ladder" / f"student-{num_steps}.pt")
        for entry in fields(student):
            assert digest(getattr(student, entry.name)) == digest(getattr(other, entry.name))


@pytest.fixture
def calls(monkeypatch):
    """The noise level and the number of images of every call of a network."""
    seen = []
    forward = UNet.forward

    def noted(network, z, logsnr, *condition, **named):
        seen.append((logsnr[0].item(), len(z)))
        return forward(network, z, logsnr, *condition, **named)

    monkeypatch.setattr(UNet, "forward", noted)
    return seen


@pytest.mark.parametrize("name", LADDERS)
def test_samples_are_drawn_on_the_students_own_grid(name, ladders, tmp_path, calls):
    """By sample.py and by evaluate.py alike, with one call of the network a step."""
    folder, _ = ladders(name)
    path = folder / f"student-{LADDERS[name]['ladder'][-1]}.pt"
    student = load_checkpoint(path)
    wanted = [(pytest.approx(level, abs=1e-5), 3) for level in student.grid[:-1]]
    draw = ("--checkpoint", path, "--count", 3, "--output")
    assert main(sample, *draw, tmp_path / "plain.npz") == 0
    assert calls == wanted
    calls.clear()
    (job,) = plan_jobs({path: student}, ["ancestral"], [5], 20, None)
    assert (job.sampler, job.steps) == (student.sampler, len(student.grid) - 1)
    Gallery(tmp_path, ALONE, 0, 3, chunk=3).images(student, path, job.sampler, job.steps, 3)
    assert calls == wanted
    if name.startswith("guided"):
        calls.clear()
        assert main(sample, *draw, tmp_path / "guided.npz", "--guidance", 2) == 0
        assert calls == wanted


def test_the_guidance_weight_changes_what_a_guided_student_draws(ladders, teachers):
    folder, _ = ladders("guided")
    path = folder / "student-4.pt"
    student = load_checkpoint(path)
    assert student.config.model.guidance
    assert student.weights["guidance_embedding.weight"].any()


def test_a_smaller_student_is_smaller_and_its_student_as_small(ladders, teachers):
    folder, _ = ladders("smaller")
    teacher = load_checkpoint(teachers["progressive"])
    for student in students(folder, "smaller").values():
        assert student.config.model.channels == SMALL["channels"]
        assert sum(t.numel() for t in student.model.values()) < sum(
            t.numel() for t in teacher.model.values()
        )


@pytest.mark.parametrize("name", ["times", "adaptive"])
def test_uneven_grids_are_not_uniform(name, ladders):
    folder, _ = ladders(name)
    student = load_checkpoint(folder / "student-3.pt")
    assert student.grid != tuple(uniform_grid(build_schedule(student.config), 3).tolist())
