"""--initialise: a new run that begins with a checkpoint's weights, and goes on."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import distill
import train
from pipeline.checkpoint import digest, load_checkpoint, publish_checkpoint, save_checkpoint
from tests.commands import refused, run, write_config
from training.resume import numbered

STILL = ("--set", "training.learning_rate=1e-30", "training.warmup=0")  # weights stay as they are


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A config, and the files that a run may begin with."""
    folder = tmp_path_factory.mktemp("workshop")
    config = write_config(folder)
    assert run(train, "--config_path", config, "--output", folder / "base") == 0
    base = folder / "base" / "diffusion-4.pt"
    ladder = ("--teacher_model_checkpoint", base, "--distillation_iterations", 1)
    assert run(distill, *ladder, "--output", folder / "ladder") == 0
    published = folder / "published.safetensors"
    publish_checkpoint(published, load_checkpoint(base), half=True)
    files = {"base": base, "student": folder / "ladder" / "student-4.pt", "published": published}
    return {"config": config, **files}


@pytest.mark.parametrize("kind", ["base", "student", "published"])
def test_a_run_begins_with_the_averaged_weights(workshop, tmp_path, kind):
    file, out = workshop[kind], tmp_path / "out"
    common = ("--config_path", workshop["config"], "--output", out, "--initialise", file)
    assert run(train, *common, *STILL) == 0
    began = load_checkpoint(file).weights
    made = load_checkpoint(out / "diffusion-4.pt")
    assert (made.kind, made.update, made.stage, made.num_steps) == ("base", 4, 0, None)
    assert made.lineage == {"initial": digest(began)}
    for state in (made.model, made.ema):
        for name, tensor in began.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-20)
    assert load_checkpoint(out / "diffusion-2.pt").lineage == made.lineage


def test_a_base_model_does_not_take_the_guidance_weight(workshop, tmp_path, capsys):
    given = ("--config_path", workshop["config"], "--output", tmp_path / "out")
    line = refused(capsys, train, *given, "--set", "model.guidance=true", "model.num_classes=10")
    assert "model.guidance: true, but only students take the guidance weight" in line
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_same_file_alone(workshop, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    given = ("--config_path", workshop["config"], "--initialise", workshop["base"])
    assert run(train, *given, "--output", whole) == 0
    shutil.copytree(whole, out)
    (out / "diffusion-4.pt").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    common = ("--config_path", workshop["config"], "--output", out)
    for file, hint in (
        (None, "of a run that began with --initialise; give the same to go on"),
        (workshop["student"], "of a run that began with --initialise and another file"),
    ):
        option = () if file is None else ("--initialise", file)
        assert f"{out / 'diffusion-2.pt'}: {hint}" in refused(capsys, train, *common, *option)
        assert before == {path: path.read_bytes() for path in before}
    copied = shutil.copy(workshop["base"], tmp_path / "elsewhere.pt")  # the weights count
    assert run(train, *common, "--initialise", copied) == 0
    one, two = (load_checkpoint(folder / "diffusion-4.pt") for folder in (whole, out))
    assert digest(vars(one)) == digest(vars(two))


def test_a_run_that_began_without_does_not_go_on_with(workshop, tmp_path, capsys):
    out = tmp_path / "out"
    common = ("--config_path", workshop["config"], "--output", out)
    assert run(train, *common) == 0
    assert load_checkpoint(out / "diffusion-4.pt").lineage == {}
    longer = (*common, "--set", "training.updates=6", "--initialise", workshop["base"])
    line = refused(capsys, train, *longer)
    assert f"{out / 'diffusion-4.pt'}: of a run that began without --initialise" in line
    assert numbered(out, "diffusion-") == [out / "diffusion-4.pt", out / "diffusion-2.pt"]


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("model.channels=16", "model.channels is 8 there, but 16 in this run"),
        ("model.num_classes=10", "model.num_classes is None there, but 10"),
        ("model.attention_heads=1", "model.attention_heads is 2 there, but 1"),
        ("diffusion.prediction=x", "diffusion.prediction is v there, but x"),
        ("data.channels=3", "data.channels is 1 there, but 3"),
    ],
)
def test_what_does_not_fit_is_named(workshop, tmp_path, capsys, setting, hint):
    out = tmp_path / "out"
    given = ("--config_path", workshop["config"], "--output", out, "--set", setting)
    line = refused(capsys, train, *given, "--initialise", workshop["published"])
    assert f"{workshop['published']}: {hint}" in line
    assert not list(out.glob("*"))


def test_other_data_and_another_dropout(workshop, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(4):
        Image.new("L", (40, 50), 60 * n).save(images / f"{n}.png")
    settings = ("data.name=image_folder", f"data.root={images}", "data.workers=0")
    given = ("--config_path", workshop["config"], "--output", tmp_path / "out")
    given += (
        "--initialise",
        workshop["student"],
        "--set",
        *settings,
        "model.dropout=0.0",
        "seed=1",
    )
    assert run(train, *given) == 0
    made = load_checkpoint(tmp_path / "out" / "diffusion-4.pt")
    began = load_checkpoint(workshop["student"])
    assert made.config.data.name == "image_folder"
    assert digest(made.model) != digest(began.model)
    size, moved = (
        sum(tensor.square().sum() for tensor in tensors)
        for tensors in (began.model.values(), (made.model[k] - v for k, v in began.model.items()))
    )
    assert moved < 0.01 * size, "it began there, not at the random weights of its seed"


def test_a_file_that_cannot_be_read_or_lies_in_the_way_is_refused(workshop, tmp_path, capsys):
    given = ("--config_path", workshop["config"], "--output", tmp_path / "out", "--initialise")
    assert "b.pt: no such checkpoint" in refused(capsys, train, *given, tmp_path / "b.pt")
    assert not (tmp_path / "out").exists()
    inside = tmp_path / "out" / "diffusion-4.pt"
    inside.parent.mkdir()
    shutil.copy(workshop["base"], inside)
    line = refused(capsys, train, *given, inside, "--restart")
    assert "with the results of its own run; give another folder" in line
    assert inside.exists(), "not deleted by --restart"


def test_a_name_that_no_checkpoint_may_have_is_refused_at_once(workshop, tmp_path, capsys):
    for name in ("x" * 210, "a\nb"):
        config = shutil.copy(workshop["config"], tmp_path / f"{name}.yaml")
        line = refused(capsys, train, "--config_path", config, "--output", tmp_path / "out")
        assert "its name '" in line
        assert not (tmp_path / "out").exists()


def test_moments_of_other_parameters_are_refused(workshop, tmp_path, capsys):
    shutil.copytree(workshop["base"].parent, tmp_path / "out")
    path = tmp_path / "out" / "diffusion-4.pt"
    stored = load_checkpoint(path)
    given = ("--config_path", workshop["config"], "--output", path.parent)
    longer = (*given, "--set", "training.updates=6")
    state = stored.optimizer["state"]
    wrong = {"exp_avg": torch.zeros(3)}
    for moments, hint in (
        ({}, None),
        ({0: state[0]}, r"not the state of 144 parameters"),
        ({**state, 1: state[0]}, r"not the moments of parameter 1, of shape (32,)"),
        ({**state, 1: {**state[1], **wrong}}, r"not the moments of parameter 1, of shape (32,)"),
        ({**state, 1: 3}, r"not the moments of parameter 1"),
        (3, "not the state of 144 parameters"),
    ):
        optimizer = {"state": moments, "param_groups": "of another optimiser"}
        save_checkpoint(path, replace(stored, optimizer=optimizer))
        if hint is None:  # all updates so far may have been skipped
            assert run(train, *longer, "--output", path.parent) == 0
            (path.parent / "diffusion-6.pt").unlink()
            continue
        assert f"{path}: optimizer: {hint}" in refused(capsys, train, *longer)


def test_a_student_begins_with_another_one_of_its_steps(workshop, tmp_path, capsys):
    """As where a student is improved by another loss; only the ladder's first one."""
    out, file = tmp_path / "out", workshop["student"]
    common = ("--teacher_model_checkpoint", workshop["base"], "--output", out)
    ladder = ("distillation.ladder=[8,4,2]", "distillation.learning_rate=1e-30")
    assert run(distill, *common, "--initialise", file, "--set", *ladder) == 0
    began = load_checkpoint(file).weights
    for steps in (4, 2):
        made = load_checkpoint(out / f"student-{steps}.pt")
        assert ("initial" in made.lineage) == (steps == 4)
        for name, tensor in began.items():
            torch.testing.assert_close(made.weights[name], tensor, rtol=0, atol=1e-20)
    teacher = {"teacher": digest(load_checkpoint(workshop["base"]).weights)}
    first = load_checkpoint(out / "student-4.pt")
    assert first.lineage == {**teacher, "initial": digest(began)}
    line = refused(capsys, distill, *common, "--set", *ladder)
    assert "student-4.pt: of a run that began with --initialise; give the same to go on" in line
    inside = ("--initialise", out / "student-4.pt")
    assert f"is in {out}, with the results of its own run" in refused(
        capsys, distill, *common, *inside
    )
    other = ("--teacher_model_checkpoint", workshop["base"], "--output", tmp_path / "other")
    sizes = "channels: 16, channel_multipliers: [1, 2], attention_resolutions: [4], patch_size: 4"
    wider = f"distillation.student={{{sizes}}}"
    line = refused(capsys, distill, *other, "--initialise", file, "--set", wider)
    assert f"{file}: model.channels is 8 there, but 16 in this run" in line


def test_students_begin_with_those_of_their_steps(workshop, tmp_path, capsys):
    common = ("--teacher_model_checkpoint", workshop["base"])
    ladder = ("--set", "distillation.ladder=[8,4,2]", "distillation.learning_rate=0.01")
    first, out = tmp_path / "first", tmp_path / "out"
    assert run(distill, *common, *ladder, "--output", first) == 0
    files = [first / "student-2.pt", first / "student-4.pt"]
    still = (*ladder, "distillation.learning_rate=1e-30", "--output", out)
    assert run(distill, *common, *still, "--initialise", *files) == 0
    for path in files:
        began, made = (load_checkpoint(one) for one in (path, out / path.name))
        assert made.lineage["initial"] == digest(began.weights)
        for name, tensor in began.weights.items():
            torch.testing.assert_close(made.weights[name], tensor, rtol=0, atol=1e-20)
    again = (*common, *ladder, "--output", tmp_path / "other", "--initialise")
    for wrong, steps in (((files[0], workshop["base"]), "any number of"), (files[:1] * 2, 2)):
        line = refused(capsys, distill, *again, *wrong)
        assert f"--initialise {wrong[1]}: of {steps} steps; of several files give at most" in line
        assert "each student of this ladder (4, 2)" in line


def test_a_student_with_another_network_begins_with_one_like_it(workshop, tmp_path):
    sizes = "channels: 16, channel_multipliers: [1, 2], attention_resolutions: [4], patch_size: 4"
    given = ("--teacher_model_checkpoint", workshop["base"], "--set", "distillation.ladder=[8,4]")
    given = (*given, f"distillation.student={{{sizes}}}")
    first, second = (tmp_path / name / "student-4.pt" for name in ("first", "second"))
    assert run(distill, *given, "--output", first.parent) == 0
    again = (*given, "distillation.learning_rate=1e-30", "--initialise", first)
    assert run(distill, *again, "--output", second.parent) == 0
    began = load_checkpoint(first).weights
    for name, tensor in load_checkpoint(second).weights.items():
        torch.testing.assert_close(tensor, began[name], rtol=0, atol=1e-20)
