"""Every method of distillation through the command line: run, sampled, killed and resumed."""

import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import distill
import evaluate
import sample
import train
from diffusion.distillation import METHODS, distillation_loss
from diffusion.grids import positions, uniform_grid
from diffusion.losses import weighted_sum
from evaluation.gallery import Gallery, RealImages, real_images
from evaluation.jobs import plan_jobs
from models.dit import DiT
from models.unet import UNet
from pipeline.build import build_dataset, build_denoiser
from pipeline.checkpoint import digest, load_checkpoint
from pipeline.config import load_config
from pipeline.data import open_dataset
from pipeline.network import build_network, build_schedule, load_weights
from pipeline.sampling import SampleRequest
from tests.commands import refused, run
from tests.processes import require_same_metrics, require_same_training, run_together
from tests.toys import tiny
from training.stage import student_stages
from training.stages import make_objective
from training.starts import Run, student_start, teacher_grid
from training.trainee import Trainee, make_trainee
from utils.processes import World

ROOT = Path(__file__).parents[1]
ALONE = World(torch.device("cpu"))

SMALL = {**tiny()["model"], "channels": 4}
LABELS = {"num_classes": 10}
DIT = {"name": "dit", "channels": 8, "depth": 1, "attention_heads": 2, "patch_size": 8}
DISTILLATION = {"updates_per_stage": 4, "batch_size": 8, "checkpoint_every": 2}
AVERAGE = {"ema_decay": 0.9}

# Each: the section distillation of its config. Those named guided have a teacher with classes, the
# one named dit a transformer.
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
    "adversarial": {"ladder": [8, 4, 1], "losses": {"snr_trunc": 1.0, "adversarial": 0.1}},
    "guided, adversarial": {
        "ladder": [8, 8, 4],
        "guidance": [0.0, 4.0],
        "losses": {"snr_trunc": 1.0, "adversarial": 0.1},
    },
    "pull": {"ladder": [8, 4], "pull": 0.1},
    "guided": {"ladder": [8, 8, 4], "guidance": [0.0, 4.0]},
    "smaller": {"ladder": [8, 8, 4], "student": SMALL},
    "dit": {"ladder": [8, 4]},
    "another network": {"ladder": [8, 8, 4], "student": DIT},
    "guided, smaller, tract": {
        "ladder": [8, 8, 2],
        "guidance": [0.0, 4.0],
        "method": ["progressive", "tract"],
        "student": {**SMALL, **LABELS},
        **AVERAGE,
    },
}


def write_config(path, name="progressive", **distillation):
    """A config of this ladder, with the classes of a guided one."""
    values = tiny(sampling={"steps": 8, "grid": 2})
    values["distillation"] = {**DISTILLATION, **LADDERS[name], **distillation}
    if name == "dit":
        values["model"] = DIT
    if name.startswith("guided"):
        values["model"] |= LABELS
        values["training"] |= {"label_dropout": 0.1}
    path.write_text(yaml.safe_dump(values))
    return path


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
    """Base models: of plain ladders, with classes of guided ones, and a transformer."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for name in ("progressive", "guided", "dit"):
        config = write_config(folder / f"{name}.yaml", name)
        assert run(train, "--config_path", config, "--output", folder / name) == 0
        found[name] = folder / name / "diffusion-4.pt"
    return found


def teacher_of(name, teachers):
    return next(
        (file for key, file in teachers.items() if name.startswith(key)), teachers["progressive"]
    )


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
            assert run(distill, *command, "--output", folder / "ladder") == 0
        else:
            with pytest.raises(Killed):
                run(distill, *command, "--output", folder / "ladder")
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
    recipe = load_config(folder.parent / "tiny.yaml").distillation
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
        assert student.critic is None
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

    def note(network):
        forward = network.forward

        def noted(network, z, logsnr, *condition, **named):
            seen.append((logsnr[0].item(), len(z)))
            return forward(network, z, logsnr, *condition, **named)

        monkeypatch.setattr(network, "forward", noted)

    for network in (UNet, DiT):
        note(network)
    return seen


@pytest.mark.parametrize("name", LADDERS)
def test_samples_are_drawn_on_the_students_own_grid(name, ladders, tmp_path, calls):
    """By sample.py and by evaluate.py alike, with one call of the network a step."""
    folder, _ = ladders(name)
    path = folder / f"student-{LADDERS[name]['ladder'][-1]}.pt"
    student = load_checkpoint(path)
    wanted = [(pytest.approx(level, abs=1e-5), 3) for level in student.grid[:-1]]
    draw = ("--checkpoint", path, "--count", 3, "--output")
    calls.clear()  # the ladder may have been made just now
    assert run(sample, *draw, tmp_path / "plain.npz") == 0
    assert calls == wanted
    calls.clear()
    (job,) = plan_jobs({path: student}, ["ancestral"], None, 20, None)
    assert (job.sampler, job.steps) == (student.sampler, len(student.grid) - 1)
    jobs = plan_jobs({path: student}, ["ancestral"], [1, 5], 20, None)
    counts = (1, 5) if student.sampler == "consistency" else (job.steps,)
    assert [(one.sampler, one.steps) for one in jobs] == [(student.sampler, n) for n in counts]
    Gallery(tmp_path, ALONE, 0, 3, chunk=3).images(student, path, job.sampler, job.steps, 3)
    assert calls == wanted
    if name.startswith("guided"):
        calls.clear()
        assert run(sample, *draw, tmp_path / "guided.npz", "--guidance", 2) == 0
        assert calls == wanted


def test_a_guided_student_learns_to_use_the_weight(ladders):
    folder, _ = ladders("guided")
    student = load_checkpoint(folder / "student-4.pt")
    assert student.config.model.guidance
    assert student.weights["guidance_embedding.weight"].any()


def test_samples_are_measured_at_each_guidance_weight(
    ladders, teachers, tmp_path, calls, monkeypatch
):
    """A guided base model takes two network calls for an image and a step, a guided student one."""
    real = real_images(load_checkpoint(teachers["guided"]).config)
    few = RealImages(real.reference[:500], real.floor[:500], real.training[:500])
    monkeypatch.setattr("evaluation.gallery.real_images", lambda config: few)
    folder, _ = ladders("guided")
    files = [teachers["guided"], folder / "student-8.pt", folder / "student-4.pt"]
    command = ("--checkpoint", *files, "--steps", 8, "--count", 20, "--batch_size", 20)
    command += ("--guidance", 0, 2, "--output", tmp_path)
    calls.clear()
    assert run(evaluate, *command) == 0
    asked = sum(images for _, images in calls)
    drawn = 125 if asked % 125 == 0 else 20
    assert asked == drawn * (8 + 16 + 2 * 8 + 2 * 4)
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    drawn_rows = [row for row in results if row["kind"] in ("base", "student")]
    rows = {(row["name"], row["guidance"]): row for row in drawn_rows}
    assert rows.keys() == {(file.stem, weight) for file in files for weight in (0.0, 2.0)}
    assert len({row["source"] for row in rows.values()}) == 6
    for (name, weight), row in rows.items():
        assert 0 <= row["asked_class"] <= 1
        assert (row["to_teacher"] is None) == (name == "diffusion-4")
        assert (row["to_base"] is None) == (name == "diffusion-4"), weight
    assert "guidance" in (tmp_path / "results.md").read_text()
    calls.clear()
    assert run(evaluate, *command) == 0
    assert not calls, "nothing is drawn again"


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


# --- what walks, and what is drawn ----------------------------------------------------------------


def objects_of(name, teachers, folder):
    """A run in the folder, its first stage, the teacher, the student's start and its trainee."""
    config = load_config(write_config(folder / "tiny.yaml", name))
    run = Run(config, "tiny", folder, ALONE, build_dataset(config, ALONE.device))
    stage, teacher = student_stages(config)[0], load_checkpoint(teacher_of(name, teachers))
    start = student_start(run, stage, teacher)
    network = build_network(start.config, ALONE.device, dropout=0.0)
    load_weights(network, start.model, folder)
    return run, stage, teacher, start, make_trainee(network, stage, ALONE)


@pytest.mark.parametrize("name", ["tract", "consistency, 2 steps"])
def test_the_teacher_walks_the_first_leg_and_the_fast_average_the_second(name, teachers, tmp_path):
    run, stage, teacher, start, trainee = objects_of(name, teachers, tmp_path)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the student, its average and the teacher differ
        for n, network in enumerate((trainee.network, trainee.walker, trainee.ema)):
            network.conv_out.weight.normal_(0.0, 0.01 * (n + 1), generator=rng)
    objective = make_objective(run, stage, trainee, start, teacher)
    x = torch.rand(8, 1, 32, 32, generator=rng) * 2 - 1
    drawn = objective.draw(rng, x.shape)
    loss, logsnr = objective.loss(x, {}, drawn)

    paths = stage.method.paths(teacher_grid(teacher, 8), start.levels())
    network = build_network(teacher.config, ALONE.device, dropout=0.0)
    load_weights(network, teacher.weights, tmp_path)
    student, walker, first = (
        build_denoiser(run.config, network, ALONE.device)
        for network in (trainee.network, trainee.walker, network)
    )
    levels = paths[:, drawn["i"]]
    legs = [first, walker]
    wanted = distillation_loss(
        student, legs, x, drawn["eps"], levels, weighted_sum({"snr_trunc": 1.0})
    )
    torch.testing.assert_close(loss, wanted)
    assert torch.equal(logsnr, levels[0])


def test_a_fresh_guided_student_draws_its_teachers_images_at_weight_0(teachers, tmp_path):
    """The layer of the guidance weight begins at zero, so at w = 0 it matches its teacher."""
    _, _, teacher, start, trainee = objects_of("guided", teachers, tmp_path)
    plain = build_network(teacher.config, ALONE.device, dropout=0.0)
    load_weights(plain, teacher.weights, tmp_path)
    drawn = [
        SampleRequest.of(
            checkpoint, build_denoiser(checkpoint.config, network, ALONE.device), ALONE, steps=8
        ).draw_all(8)
        for checkpoint, network in ((teacher, plain), (start, trainee.network))
    ]
    assert drawn[0].float().std() > 0
    assert torch.equal(*drawn)


# --- a part of a ladder, and its config -----------------------------------------------------------


def printed(capsys, *arguments):
    capsys.readouterr()
    assert run(distill, *arguments, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_part_of_a_ladder_has_its_own_stages_values(teachers, tmp_path, capsys):
    config = write_config(
        tmp_path / "tiny.yaml",
        ladder=None,
        first_steps=8,
        iterations=4,
        method=["progressive", "tract", "consistency", "progressive"],
        updates_per_stage=[1, 2, 3, 4],
        learning_rate=[1.0e-3, 2.0e-3, 3.0e-3, 4.0e-3],
        time_exponent=[1.0, 2.0, 3.0, 4.0],
        ema_decay=0.9,
    )
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    part = ("--initial_sampling_steps", 4, "--distillation_iterations", 2)
    values = printed(capsys, *command, *part)["distillation"]
    assert (values["first_steps"], values["iterations"], values["ladder"]) == (4, 2, None)
    assert values["method"] == ["tract", "consistency"]
    assert values["updates_per_stage"] == [2, 3]
    assert values["learning_rate"] == [2.0e-3, 3.0e-3]
    assert values["time_exponent"] == [2.0, 3.0]


@pytest.mark.parametrize("name", LADDERS)
def test_a_printed_config_is_the_same_config(name, teachers, tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", name)
    teacher = ("--teacher_model_checkpoint", teacher_of(name, teachers))
    values = printed(capsys, "--config_path", config, *teacher)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(values))
    assert printed(capsys, "--config_path", again, *teacher) == values
    assert load_config(again).distillation == load_config(config).distillation


def test_a_student_can_be_distilled_on_other_data_than_its_teachers(ladders, teachers, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data="inverted_mnist")
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    assert run(distill, *command, "--output", tmp_path / "ladder") == 0
    other = load_checkpoint(tmp_path / "ladder" / "student-4.pt")
    assert other.config.data.name == "mnist", "it is a model of its teacher's data all the same"
    own = load_checkpoint(ladders("progressive")[0] / "student-4.pt")
    assert digest(other.weights) != digest(own.weights)


# --- bad input ------------------------------------------------------------------------------------

WRONG = {  # what is asked for -> what the line says
    "no divisor": ({"ladder": [8, 3]}, "distillation: ladder: 3 does not divide the 8 steps"),
    "not fewer": ({"ladder": [8, 4, 4]}, "distillation: ladder: 4 steps after 4"),
    "more": ({"ladder": [4, 8]}, "distillation: ladder: 8 steps after 4"),
    "rising grid": (
        {"ladder": [8, 3], "grid": [1.0, 0.25, 0.5, 0.0]},
        "distillation: grid: [1.0, 0.25, 0.5, 0.0] does not decrease from 1 to 0",
    ),
    "grid of other steps": (
        {"ladder": [8, 2], "grid": [1.0, 0.5, 0.25, 0.0]},
        "distillation: grid: lists the times of 3 steps",
    ),
    "grid beside the teacher's": (
        {"ladder": [8, 2], "grid": [1.0, 0.3, 0.0]},
        "distillation.grid: 0.3 is none of the times of the teacher's 8 steps, which are multiples "
        "of 1/8; take e.g. 0.25",
    ),
    "no average": ({"ladder": [8, 4], "method": "tract"}, "ema_decay: the method tract"),
    "unknown method": ({"method": "regressive"}, "distillation.method: 'regressive' is not one of"),
    "unknown data": ({"data": "inverted"}, "distillation.data: 'inverted' is not one of"),
    "unknown loss": ({"losses": {"lpips": 1.0}}, "distillation.losses: 'lpips' is not one of"),
    "unknown key": (
        {"student": {**SMALL, "chanels": 4}},
        "distillation.student.chanels: unknown key; did you mean channels?",
    ),
    "other classes": (
        {"student": {**SMALL, "num_classes": 7}},
        "distillation.student.num_classes: 7, but the teacher has None",
    ),
    "guidance of a student alone": (
        {"student": {**SMALL, "guidance": True}},
        "distillation.student.guidance: follows from distillation.guidance",
    ),
    "guidance without classes": (
        {"guidance": [0.0, 4.0]},
        "distillation.guidance: needs a teacher that is conditional",
    ),
    "guidance range": ({"guidance": [4.0, 0.0]}, "guidance: [4.0, 0.0] is no range"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_distilled_is_refused_in_one_line(wrong, teachers, tmp_path, capsys):
    changes, said = WRONG[wrong]
    config = write_config(tmp_path / "tiny.yaml", **changes)
    output = tmp_path / "ladder"
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    line = refused(capsys, distill, *command, "--output", output)
    assert said in line
    assert not list(output.glob("*.pt"))


def test_students_are_checked_against_their_teacher_not_the_yamls_network(
    teachers, tmp_path, capsys
):
    config = write_config(tmp_path / "tiny.yaml", ladder=[8, 4])  # a network without classes
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["guided"], "--set")
    values = printed(capsys, *command, "distillation.guidance=[0.0,4.0]")
    assert values["distillation"]["guidance"] == [0.0, 4.0]
    assert values["model"]["num_classes"] == 10
    other = printed(capsys, *command, "distillation.student.num_classes=10")
    assert other["distillation"]["student"]["num_classes"] == 10
    line = refused(capsys, distill, *command, "distillation.student.num_classes=7")
    assert "distillation.student.num_classes: 7, but the teacher has 10" in line


def test_a_section_that_is_none_is_one_line(teachers, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**tiny(), "distillation": 3}))
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    assert "tiny.yaml: distillation" in refused(capsys, distill, *command)


def test_a_teacher_of_numbers_that_are_not_finite_chooses_no_grid(
    teachers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.stages.jump_errors", lambda *a: torch.full((9, 9), torch.nan))
    config = write_config(tmp_path / "tiny.yaml", "adaptive")
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    line = refused(capsys, distill, *command, "--output", tmp_path / "ladder")
    assert "distillation.grid: adaptive, but the teacher's predictions are not finite" in line


@pytest.mark.parametrize(("key", "value"), [("first_steps", 64), ("iterations", 2)])
def test_halvings_beside_a_ladder_are_refused(key, value, teachers, tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", ladder=[8, 4])
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    line = refused(capsys, distill, *command, "--set", f"distillation.{key}={value}")
    assert f"distillation.{key} does nothing beside distillation.ladder = [8, 4]" in line
    asked = ("--set", "distillation.ladder=null", f"distillation.{key}={value}")
    assert printed(capsys, *command, *asked)["distillation"][key] == value
    other = ("--set", "distillation.ladder=[8,2]", f"distillation.{key}={value}")
    assert printed(capsys, *command, *other)["distillation"]["ladder"] == [8, 2]


def test_a_ladder_begins_with_the_steps_of_its_teacher(ladders, tmp_path, capsys):
    folder, _ = ladders("progressive")
    config = write_config(tmp_path / "tiny.yaml", ladder=[8, 2])
    command = ("--config_path", config, "--teacher_model_checkpoint", folder / "student-4.pt")
    line = refused(capsys, distill, *command, "--output", tmp_path / "ladder")
    assert line.endswith("student-4.pt: makes 4 steps, but distillation.ladder begins with 8")


def test_a_teacher_never_shown_images_without_their_class_cannot_be_guided(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", "guided")
    out = ("--output", tmp_path / "base")
    never = ("--set", "training.label_dropout=0.0", "training.updates=1")
    assert run(train, "--config_path", config, *out, *never) == 0
    base = tmp_path / "base" / "diffusion-1.pt"
    command = ("--config_path", config, "--teacher_model_checkpoint", base)
    line = refused(capsys, distill, *command, "--output", tmp_path / "ladder")
    assert "training.label_dropout" in line
    drawn = ("--count", 1, "--output", tmp_path / "x.npz", "--steps", 1)
    assert run(sample, "--checkpoint", base, "--guidance", 2, *drawn) == 0
    assert (
        "warning: this model was never shown images without their class" in capsys.readouterr().err
    )


def test_a_weight_that_a_student_was_not_distilled_for_is_warned_of(ladders, tmp_path, capsys):
    folder, _ = ladders("guided")
    for weight in (4, 9):
        drawn = ("--count", 1, "--output", tmp_path / "x.npz", "--guidance", weight)
        assert run(sample, "--checkpoint", folder / "student-8.pt", *drawn) == 0
        warned = "--guidance 9: this student was distilled for 0.0 to 4.0"
        assert (warned in capsys.readouterr().err) == (weight == 9)


def test_a_guided_teacher_has_students_that_take_the_weight(ladders, tmp_path, capsys):
    folder, _ = ladders("guided")
    config = write_config(tmp_path / "tiny.yaml", "guided", ladder=[4, 2], guidance=None)
    command = ("--config_path", config, "--teacher_model_checkpoint", folder / "student-4.pt")
    line = refused(capsys, distill, *command, "--output", tmp_path / "ladder")
    assert "distillation.guidance" in line


def test_a_student_that_takes_no_weight_cannot_be_guided(teachers, tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", "guided", ladder=[4, 2], guidance=None)
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["guided"])
    few = ("--set", "distillation.updates_per_stage=1")
    assert run(distill, *command, "--output", tmp_path / "ladder", *few) == 0
    student = tmp_path / "ladder" / "student-2.pt"
    draw = ("--checkpoint", student, "--guidance", 2)
    line = refused(capsys, sample, *draw, "--output", tmp_path / "grid.png")
    assert "--guidance 2.0: this student does not take a guidance weight" in line
    config = write_config(tmp_path / "tiny.yaml", "guided", ladder=[2, 1])
    command = ("--config_path", config, "--teacher_model_checkpoint", student)
    line = refused(capsys, distill, *command, "--output", tmp_path / "more")
    assert "a student that takes no guidance weight" in line


def test_what_is_no_section_is_refused(teachers, tmp_path, capsys):
    command = ("--teacher_model_checkpoint", teachers["progressive"], "--output", tmp_path / "x")
    for value in ("false", "0", "[]"):
        line = refused(capsys, distill, *command, "--set", f"distillation={value}")
        assert "distillation: input should be a valid dictionary" in line


def test_a_ladder_is_drawn_without_a_warning_of_steps_and_weights(
    ladders, teachers, tmp_path, capsys
):
    """The first teacher in its students' steps, and a weight of guidance that they know."""
    folder, _ = ladders("pull")
    config = write_config(tmp_path / "tiny.yaml", ladder=[4, 2])
    command = ("--config_path", config, "--teacher_model_checkpoint")
    capsys.readouterr()
    assert run(distill, *command, folder / "student-4.pt", "--output", tmp_path / "one") == 0
    config = write_config(tmp_path / "tiny.yaml", "guided", ladder=[4, 2], guidance=[1.0, 4.0])
    assert run(distill, *command, teachers["guided"], "--output", tmp_path / "two") == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert "(2 images, not clipped, guidance 1)" in out


def test_a_student_of_the_same_teacher_at_other_steps_is_another_student(
    ladders, teachers, tmp_path, capsys
):
    """A base model is taken at any steps: student-4.pt may be of 8 or of 12 of them."""
    folder, _ = ladders("pull")
    config = write_config(tmp_path / "tiny.yaml", "pull", ladder=[12, 4])
    command = ("--config_path", config, "--teacher_model_checkpoint", teachers["progressive"])
    line = refused(capsys, distill, *command, "--output", folder)
    assert "distillation.ladder" in line


# --- published students ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.safetensors")), ids=str)
def test_published_students_have_levels_of_their_teacher_and_ddim(path):
    """A uniform grid of their own step count, or an uneven part of the teacher's 128 steps."""
    checkpoint = load_checkpoint(path)
    steps = re.search(r"-(\d+)-steps?$", path.stem)
    if steps is None:
        assert (checkpoint.num_steps, checkpoint.sampler) == (None, None)
        return
    schedule, count = build_schedule(checkpoint.config), int(steps[1])
    assert (checkpoint.num_steps, checkpoint.sampler) == (count, "ddim")
    uniform = torch.equal(checkpoint.levels(), uniform_grid(schedule, count))
    of_its_own = path.stem != "mnist-half-width-8-steps"  # which has those of TRACT's student
    evenly = checkpoint.config.distillation.grid == "uniform" and of_its_own
    assert uniform == (evenly or count == 1)
    assert uniform or positions(uniform_grid(schedule, 128), checkpoint.levels())[-1] == 128


# --- two processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tract", "guided", "adversarial"])
def test_two_processes_distil_what_one_distils(name, ladders, teachers, tmp_path):
    """As tests/test_distributed.py has it of training and halving."""
    folder, _ = ladders(name)
    config = write_config(tmp_path / "tiny.yaml", name)
    command = ("--config_path", config, "--teacher_model_checkpoint", teacher_of(name, teachers))
    two = tmp_path / "ladder"
    run_together(2, "distill", *command, "--output", two)
    last = f"student-{LADDERS[name]['ladder'][-1]}.pt"
    one, other = load_checkpoint(folder / last), load_checkpoint(two / last)
    assert one.grid == other.grid
    require_same_training(load_checkpoint(teacher_of(name, teachers)), one, other)
    require_same_metrics(folder, two)
