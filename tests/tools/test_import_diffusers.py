"""diffusers' pipelines as teachers: the same images as there, distilled, and bad folders."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import sample
from diffusion.betas import BETAS
from diffusion.gaussian import velocity
from diffusion.samplers import ddim
from pipeline.build import build_dataset, build_network, load_denoiser
from pipeline.checkpoint import Checkpoint, digest, load_checkpoint, publish_checkpoint
from pipeline.config import make_config
from tests.commands import refused, run
from tests.tools import test_export_diffusers as exporting
from tools import export_diffusers, export_onnx, import_diffusers
from tools.onnx_file import read_onnx
from training.ladder import distillation_config
from training.stage import student_stages
from training.stages import make_objective
from training.starts import Run, student_start
from training.trainee import make_trainee
from utils.processes import World

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
ALONE = World(CPU)
SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
SCHEDULES = [*BETAS, "trained_betas"]
INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"
MNIST = ("--set", "data.name=mnist")


def scheduler_values(schedule, prediction="v_prediction", num_steps=1000):
    values = {"num_train_timesteps": num_steps, "prediction_type": prediction}
    if schedule == "trained_betas":
        return {**values, "trained_betas": torch.linspace(1e-3, 0.03, num_steps).tolist()}
    return {**values, "beta_schedule": schedule}


def save_pipeline(folder, scheduler, **sizes):
    """A pipeline of a small random network, saved by diffusers; returns its network."""
    torch.manual_seed(1)
    network = diffusers.UNet2DModel(**{**SIZES, **sizes}).eval()
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    return network


def pipeline(folder, schedule="linear", prediction="v_prediction", num_steps=1000, **sizes):
    scheduler = diffusers.DDPMScheduler(**scheduler_values(schedule, prediction, num_steps))
    return save_pipeline(folder, scheduler, **sizes)


def imported(folder, *more):
    output = folder.parent / f"{folder.name}.safetensors"
    assert run(import_diffusers, folder, "--output", output, *more) == 0
    return output


@torch.no_grad()
def theirs(network, z, num_steps, **values):
    """Samples of diffusers' DDIM at the trailing timesteps."""
    scheduler = diffusers.DDIMScheduler(
        **values, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    for i in scheduler.timesteps:
        z = scheduler.step(network(z, i).sample, i, z, eta=0.0).prev_sample
    return z


@torch.no_grad()
def ours(path, z, num_steps, shift=0):
    """Samples at the levels of the imported checkpoint. shift: of the network's time input."""
    checkpoint = load_checkpoint(path)
    checkpoint.model["table"] = checkpoint.model["table"].roll(shift)
    denoiser = load_denoiser(checkpoint, path, CPU)
    return ddim(denoiser, z, checkpoint.levels(num_steps))


def difference(a, b):
    """The largest difference in units of the images' scale, which untrained networks leave open."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_gives_diffusers_own_images(schedule, prediction, tmp_path):
    network = pipeline(tmp_path / "p", schedule, prediction)
    path = imported(tmp_path / "p", *MNIST)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.diffusion.prediction == PREDICTIONS[prediction]
    assert (checkpoint.kind, checkpoint.num_steps, len(checkpoint.grid)) == ("base", None, 1001)
    z = torch.randn(2, 1, 8, 8)
    wanted = theirs(network, z, 20, **scheduler_values(schedule, prediction))
    same, shifted = (difference(ours(path, z, 20, shift), wanted) for shift in (0, 1))
    print(f"{schedule}, {prediction}: {same:.1e}; with the table shifted by one {shifted:.1e}")
    assert same < 1e-5
    assert shifted > 1e-3, "a time input that is off by one shows"


def test_no_signal_at_the_first_level_gives_diffusers_own_images(tmp_path):
    values = {**scheduler_values("linear"), "rescale_betas_zero_snr": True}
    network = save_pipeline(tmp_path / "p", diffusers.DDIMScheduler(**values))
    path, z = imported(tmp_path / "p", *MNIST), torch.randn(2, 1, 8, 8)
    same = difference(ours(path, z, 20), theirs(network, z, 20, **values))
    print(f"no terminal signal: {same:.1e}")
    assert same < 1e-5


@pytest.mark.parametrize(
    "sizes",
    [
        {"attention_head_dim": None},
        {"sample_size": (8, 8)},
        {"in_channels": 3, "out_channels": 3, "time_embedding_type": "learned"},
        {"center_input_sample": True, "resnet_time_scale_shift": "scale_shift", "freq_shift": 1},
        {"downsample_type": "resnet", "upsample_type": "resnet", "flip_sin_to_cos": False},
    ],
    ids=lambda sizes: ", ".join(sizes),
)
def test_other_networks_give_their_images_too(sizes, tmp_path):
    values = scheduler_values("linear", num_steps=40)
    more = {"num_train_timesteps": 40} if "time_embedding_type" in sizes else {}
    network = pipeline(tmp_path / "p", num_steps=40, **sizes, **more)
    path, z = imported(tmp_path / "p", *MNIST), torch.randn(2, network.config.in_channels, 8, 8)
    same = difference(ours(path, z, 20), theirs(network, z, 20, **values))
    print(f"{', '.join(sizes)}: {same:.1e}")
    assert same < 1e-5


@pytest.mark.parametrize("num_steps", [1, 7, 20, 125, 1000])
def test_levels_are_those_of_diffusers_trailing_timesteps(num_steps, tmp_path):
    pipeline(tmp_path / "p")
    checkpoint = load_checkpoint(imported(tmp_path / "p", *MNIST))
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert torch.equal(
        checkpoint.levels(num_steps)[:-1], checkpoint.model["table"][scheduler.timesteps]
    )
    abar = scheduler.alphas_cumprod[scheduler.timesteps]
    torch.testing.assert_close(
        checkpoint.levels(num_steps)[:-1].sigmoid().float(), abar, rtol=1e-4, atol=1e-7
    )


def test_the_settings_of_the_pipeline_are_kept(tmp_path, capsys):
    sizes = {"dropout": 0.3, "num_class_embeds": 10}
    pipeline(tmp_path / "p", "squaredcos_cap_v2", "epsilon", num_steps=20, **sizes)
    checkpoint = load_checkpoint(imported(tmp_path / "p", *MNIST, "seed=3"))
    config = checkpoint.config
    assert (config.data.name, config.data.image_size, config.data.channels) == ("mnist", 8, 1)
    assert (config.model.num_classes, config.model.dropout, config.seed) == (10, 0.3, 3)
    assert config.diffusion.schedule == "table"
    assert config.distillation.ladder == (20, 20, 10, 5, 1)
    assert config.distillation.prediction == "v"
    assert (config.sampling.steps, config.sampling.clip) == (20, True)
    assert "next: python distill.py --teacher_model_checkpoint" in capsys.readouterr().out
    values = {**scheduler_values("linear", num_steps=20), "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(**values, set_alpha_to_one=False)
    save_pipeline(tmp_path / "q", scheduler)
    checkpoint = load_checkpoint(imported(tmp_path / "q"))
    assert checkpoint.config.data.name == "image_folder"
    assert checkpoint.config.distillation.ladder == (20, 10, 5, 1)
    assert not checkpoint.config.sampling.clip
    said = capsys.readouterr()
    assert "set_alpha_to_one: false" in said.err
    assert "data.root=DIR" in said.out


def test_old_pipelines_in_one_folder_with_old_names(tmp_path):
    pipeline(tmp_path / "p", num_steps=20)
    wanted = load_checkpoint(imported(tmp_path / "p", *MNIST))
    shutil.copytree(tmp_path / "p" / "unet", tmp_path / "old")
    for file in (tmp_path / "p" / "scheduler" / "scheduler_config.json", tmp_path / "p" / INDEX):
        shutil.copy(file, tmp_path / "old")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name):
        for here, there in new.items():
            name = name.replace(f".{here}.", f".{there}.")
        return name

    path = tmp_path / "old" / WEIGHTS
    weights = {old_name(name): tensor for name, tensor in load_file(path).items()}
    assert any(".query." in name for name in weights)
    save_file(weights, path)
    edit(tmp_path / "old" / "scheduler_config.json", prediction_type=None, predict_epsilon=False)
    made = load_checkpoint(imported(tmp_path / "old", *MNIST))
    assert digest(made.model) == digest(wanted.model)
    assert made.grid == wanted.grid
    assert made.config.diffusion.prediction == "x"


def test_a_published_table_stays_as_it_is(tmp_path):
    pipeline(tmp_path / "p")
    path = imported(tmp_path / "p", *MNIST)
    half = tmp_path / "half.safetensors"
    for _ in range(2):
        publish_checkpoint(half, load_checkpoint(path), half=True)
        assert half.stat().st_size < 0.8 * (tmp_path / "p.safetensors").stat().st_size
        assert torch.equal(
            load_checkpoint(half).model["table"], load_checkpoint(path).model["table"]
        )
        path = half


def test_what_export_diffusers_writes_is_imported_with_the_same_images(tmp_path):
    sizes = {"channels": 32, "channel_multipliers": [1, 2], "attention_heads": 1, "patch_size": 1}
    sizes |= {"attention_resolutions": [], "blocks_per_level": 1, "resample": "conv"}
    values = {"data": {"image_size": 8}, "model": sizes, "sampling": {"steps": 8}}
    config = make_config(values, "x.yaml")
    torch.manual_seed(0)
    model = build_network(config, CPU).state_dict()
    model = {name: t + 0.05 * torch.randn_like(t) for name, t in model.items()}
    base = Checkpoint(kind="base", name="x", config=config, update=0, stage=0, model=model)
    first, second = tmp_path / "first.safetensors", tmp_path / "again"
    publish_checkpoint(first, base, half=False)
    assert run(export_diffusers, first, "--output", tmp_path / "p") == 0
    path = imported(tmp_path / "p", *MNIST)
    made, z = load_checkpoint(path), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(made.levels(), base.levels(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        wanted = ddim(load_denoiser(base, first, CPU), z, base.levels())
    same = difference(ours(path, z, 8), wanted)
    print(f"exported and imported again: {same:.1e}")
    assert same < 1e-5
    assert run(export_diffusers, path, "--output", second) == 0
    assert digest(load_checkpoint(imported(second, *MNIST)).model) == digest(made.model)


# --- distilled ------------------------------------------------------------------------------------

FAST = ("updates_per_stage=3", "batch_size=8", "checkpoint_every=2", "learning_rate=1e-3")


def ladder(path, output, steps, *more):
    settings = [f"distillation.{value}" for value in (f"ladder={steps}", *FAST)]
    settings += ["sampling.grid=4", *more]
    common = ("--teacher_model_checkpoint", path, "--output", output, "--set", *settings)
    assert run(distill, *common) == 0
    return {n: load_checkpoint(output / f"student-{n}.pt") for n in set(steps[1:])}


def test_two_stages_are_distilled_and_sampled(tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    base = load_checkpoint(path)
    students = ladder(path, tmp_path / "out", [20, 10, 5])
    assert students[10].grid == base.grid[::2]
    assert students[5].grid == base.grid[::4]
    for n, student in students.items():
        assert (student.kind, student.num_steps, student.config.model.name) == (
            "student",
            n,
            "diffusers_unet",
        )
        assert torch.equal(student.model["table"], base.model["table"])
        assert digest(student.model) != digest(base.model)
    assert students[10].lineage == {"teacher": digest(base.model)}
    images = tmp_path / "x.npz"
    drawn = ("--checkpoint", tmp_path / "out" / "student-5.pt", "--count", 4, "--output", images)
    assert run(sample, *drawn) == 0
    assert run(sample, *drawn, "--steps", 2) == 0
    assert "a table of 5 noise levels" in refused(capsys, sample, *drawn, "--steps", 6)
    (tmp_path / "back").mkdir()
    given_back = exporting.export(tmp_path / "back", students[5])
    clip = students[5].config.sampling.clip
    expected = exporting.ours(students[5], 64)
    share, most = exporting.share_apart(exporting.theirs(given_back, 64, 5, clip), expected)
    assert share <= 1e-3, "diffusers draws the images of the exported student"
    assert most <= 1
    line = refused(capsys, sample, "--checkpoint", path, "--steps", 21)
    assert "21 steps: this checkpoint has a table of 20 noise levels" in line
    more = ("--set", "distillation.ladder=[40,20]", "--output", tmp_path / "more")
    line = refused(capsys, distill, "--teacher_model_checkpoint", path, *more)
    assert f"{path}: has 20 noise levels, but is asked for 40 steps" in line
    critic = (
        "distillation.losses={snr_trunc: 1.0, adversarial: 0.1}",
        "distillation.ladder=[20,10]",
    )
    more = ("--set", *critic, "--output", tmp_path / "critic")
    line = refused(capsys, distill, "--teacher_model_checkpoint", path, *more)
    assert f"{path}: distillation.losses: adversarial takes the features of the teacher" in line


def test_an_eps_teacher_is_matched_by_v_students(tmp_path, capsys):
    pipeline(tmp_path / "p", "squaredcos_cap_v2", "epsilon", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    base = load_checkpoint(path)
    capsys.readouterr()
    students = ladder(path, tmp_path / "out", [20, 20, 10])
    assert "predicts eps" not in capsys.readouterr().err
    assert students[20].grid == base.grid
    for student in students.values():
        assert student.config.diffusion.prediction == "v"
    denoiser = load_denoiser(students[10], path, CPU)
    assert denoiser.output_type == "v"
    z, logsnr = torch.randn(2, 1, 8, 8), torch.full((2,), base.grid[0])
    assert denoiser(z, logsnr).x.abs().max() < 20, "an eps student's would be divided by alpha"
    distillation_config(base, path, None, [])
    assert "predicts eps" not in capsys.readouterr().err
    distillation_config(base, path, None, ["distillation.prediction=null"])
    said = capsys.readouterr().err
    assert "predicts eps, and at its first level the error of x_hat is" in said
    assert "distillation.prediction=v distillation.ladder=[20,20,..]" in said


def test_a_v_student_that_agrees_with_its_eps_teacher_has_no_loss(tmp_path):
    pipeline(tmp_path / "p", "linear", "epsilon", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    base = load_checkpoint(path)
    config = distillation_config(base, path, None, ["distillation.ladder=[20,20,10]"])
    run_of = Run(config, "p", tmp_path, ALONE, build_dataset(config, CPU))
    stage, teacher = student_stages(config)[0], load_denoiser(base, path, CPU)
    start = student_start(run_of, stage, base)
    trainee = make_trainee(build_network(start.config, CPU, dropout=0.0), stage, ALONE)

    def agrees(z, logsnr):
        return velocity(teacher(z, logsnr), logsnr)

    x = torch.rand(8, 1, 8, 8) * 2 - 1
    losses = {}
    for name, network in (("v", agrees), ("eps", teacher.network)):
        objective = make_objective(run_of, stage, replace(trainee, called=network), start, base)
        drawn = objective.draw(torch.Generator().manual_seed(0), x.shape)
        losses[name] = objective.loss(x, {}, drawn)[0].max().item()
    print(
        f"loss of a student that says the teacher's v: {losses['v']:.1e}, eps: {losses['eps']:.1e}"
    )
    assert losses["v"] < 1e-6
    assert losses["eps"] > 0.01


STUDENT = (
    "{channels: 8, channel_multipliers: [1, 2], blocks_per_level: 1, attention_resolutions: []"
)


@pytest.mark.parametrize(
    "change", ["prediction=both", f"student={STUDENT}, patch_size: 1}}"], ids=["both", "unet"]
)
def test_students_of_another_output_or_network(change, tmp_path):
    pipeline(tmp_path / "p", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    student = ladder(path, tmp_path / "out", [20, 10], f"distillation.{change}")[10]
    assert student.grid == load_checkpoint(path).grid[::2]
    if change.startswith("prediction"):
        assert student.model["unet.conv_out.weight"].shape[0] == 2
        assert student.config.diffusion.prediction == "both"
    else:
        assert student.config.model.name == "unet"
        assert "table" not in student.model


def test_classes(tmp_path, capsys):
    """A row for no class is one more than there are classes; without it -1 is refused."""
    pipeline(tmp_path / "p", num_steps=20, num_class_embeds=11)
    given = (tmp_path / "p", "--output", tmp_path / "x.safetensors", *MNIST)
    line = refused(capsys, import_diffusers, *given, "model.num_classes=9")
    assert "model.num_classes: 9, but its num_class_embeds is 11" in line
    path = imported(tmp_path / "p", *MNIST, "model.num_classes=10")
    labels = ("--labels=-1", "--count", 2, "--output", tmp_path / "x.npz")
    assert run(sample, "--checkpoint", path, *labels) == 0
    assert 10 in ladder(path, tmp_path / "out", [20, 10])
    shutil.copytree(tmp_path / "p", tmp_path / "q")
    other = imported(tmp_path / "q", *MNIST)  # eleven classes
    more = ("--teacher_model_checkpoint", other, "--output", tmp_path / "no")
    assert "has 10 classes" in refused(capsys, distill, *more)
    assert "none for no class" in refused(capsys, sample, "--checkpoint", other, *labels)
    network = build_network(load_checkpoint(path).config, CPU, dropout=0.0).eval()
    z, logsnr = torch.randn(3, 1, 8, 8), torch.zeros(3)
    free = network(z, logsnr, torch.tensor([3, -1, -1]))
    assert torch.equal(free[1:], network(z[1:], logsnr[1:]))
    rows = network.unet.class_embedding.weight
    with torch.no_grad():
        rows[10] += 1.0
    changed = network(z, logsnr, torch.tensor([3, -1, -1]))
    assert torch.equal(changed[0], free[0])
    assert not torch.equal(changed[1], free[1])


def test_classes_without_a_row_for_none_are_exported_to_onnx(tmp_path):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    pipeline(tmp_path / "p", num_steps=20, num_class_embeds=3)
    path, file = imported(tmp_path / "p", *MNIST), tmp_path / "x.onnx"
    assert run(export_onnx, path, "--one_step", "--output", file) == 0
    z, logsnr, label = torch.randn(3, 1, 8, 8), torch.zeros(3), torch.tensor([0, 2, 1])
    wanted = load_denoiser(load_checkpoint(path), path, CPU)(z, logsnr, label=label)
    x, _ = read_onnx(file)(z=z, logsnr=logsnr, label=label)
    assert (x - wanted.x).abs().max() < 1e-4


def test_the_time_input_is_the_number_of_the_nearest_level(tmp_path):
    pipeline(tmp_path / "p", num_steps=20)
    checkpoint = load_checkpoint(imported(tmp_path / "p", *MNIST))
    network = build_network(checkpoint.config, CPU, dropout=0.0).eval()
    network.load_state_dict(checkpoint.model)
    z, table = torch.randn(1, 1, 8, 8), checkpoint.model["table"]
    for i in range(20):
        wanted = network.unet(z, i).sample
        for logsnr in (table[i], table[i] + 1e-4, table[i] - 1e-4):
            assert torch.equal(network(z, logsnr[None].float()), wanted)
    assert torch.equal(network(z, torch.tensor([torch.inf])), network.unet(z, 0).sample)


# --- what is refused ------------------------------------------------------------------------------


def edit(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key) if value is None else values.update({key: value})
    path.write_text(json.dumps(values))


def pickled(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def damaged(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(folder):
    path = folder / "unet" / WEIGHTS
    save_file({k: t for k, t in load_file(path).items() if k != "conv_in.bias"}, path)


def index(**changes):
    return lambda folder: edit(folder / INDEX, **changes)


def scheduler(**changes):
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


def unet(**changes):
    return lambda folder: edit(folder / "unet" / "config.json", **changes)


UNETS = "unet: UNet2DConditionModel; UNet2DModel is taken"
BAD = {
    "pickles": (pickled, "diffusion_pytorch_model.bin may run code and is not read"),
    "a damaged file": (damaged, "not a whole safetensors file"),
    "a missing weight": (without_a_weight, "1 missing: unet.conv_in.bias"),
    "no index": (lambda f: (f / INDEX).unlink(), "model_index.json: no such file"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "model_index.json: not JSON"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "not a mapping"),
    "deep": (lambda f: (f / INDEX).write_text("[" * 10**5), "not JSON"),
    "text to image": (index(unet=["diffusers", "UNet2DConditionModel"]), UNETS),
    "latents": (index(vqvae=["diffusers", "VQModel"]), "vqvae: only pipelines of a unet and"),
    "another scheduler": (
        index(scheduler=["diffusers", "ScoreSdeVeScheduler"]),
        "ScoreSdeVeScheduler; DDPMScheduler or DDIMScheduler is taken",
    ),
    "no unet": (index(unet=None), "unet: missing"),
    "another class": (unet(_class_name="UNet2DConditionModel"), "_class_name: UNet2DCondition"),
    "learned variance": (scheduler(variance_type="learned_range"), "variance_type: learned_range"),
    "two outputs": (unet(out_channels=2), "out_channels: 2 for 1 in_channels, as for a learned"),
    "another schedule": (scheduler(beta_schedule="sigmoid"), "beta_schedule: 'sigmoid' is not one"),
    "another prediction": (scheduler(prediction_type="flow"), "prediction_type: 'flow' is not one"),
    "no timesteps": (scheduler(num_train_timesteps=None), "num_train_timesteps: missing"),
    "too many timesteps": (scheduler(num_train_timesteps=10**12), "num_train_timesteps: "),
    "a large beta": (scheduler(beta_end=1.5), "beta_end: "),
    "few betas": (scheduler(trained_betas=[0.1]), "trained_betas: 1 of them for 20 timesteps"),
    "no noise": (scheduler(beta_start=0.0, beta_end=0.0), "its betas are no noise schedule"),
    "betas too small": (scheduler(beta_start=0.5, beta_end=1e-12), "no noise schedule"),
    "no signal": (
        scheduler(rescale_betas_zero_snr=True, prediction_type="epsilon"),
        "epsilon says nothing of the image where there is no signal",
    ),
    "a beta of 1": (
        scheduler(trained_betas=[0.1] * 19 + [1.0], prediction_type="epsilon"),
        "epsilon says nothing",
    ),
    "not square": (unet(sample_size=[8, 16]), "sample_size: [8, 16]; square ones are taken"),
    "no size": (unet(sample_size=None), "sample_size: missing"),
    "a text as size": (unet(sample_size="8"), "config.json: sample_size: input should be"),
    "latents alone": (unet(in_channels=4, out_channels=4), "in_channels: "),
    "an unknown argument": (unet(wings=2), "model.config: no UNet2DModel for images of 8 pixels"),
    "an unknown block": (unet(down_block_types=["Down", "Down"]), "model.config: no UNet2DModel"),
    "blocks that do not fit": (unet(block_out_channels=[8]), "model.config: no UNet2DModel"),
    "other widths": (unet(block_out_channels=[8, 32]), "of another shape"),
    "huge": (unet(block_out_channels=[2**40, 2**41]), "model.config: no UNet2DModel"),
    "endless": (unet(layers_per_block=10**9), "layers_per_block: not a whole number"),
    "odd": (unet(sample_size=9), "no UNet2DModel for images of 9 pixels"),
    "few times": (
        unet(time_embedding_type="learned", num_train_timesteps=10),
        "num_train_timesteps: 10 learned time embeddings for 20 noise levels",
    ),
    "noise as time": (unet(time_embedding_type="fourier"), "time_embedding_type 'fourier'"),
    "classes as times": (unet(class_embed_type="timestep"), "class_embed_type: only null"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_one_line(name, tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20)
    spoil, said = BAD[name]
    spoil(tmp_path / "p")
    output = tmp_path / "x.safetensors"
    line = refused(capsys, import_diffusers, tmp_path / "p", "--output", output, *MNIST)
    print(line)
    assert line.startswith(f"error: {tmp_path / 'p'}")
    assert said in line
    assert not output.exists()


def test_more_steps_than_levels_are_refused_before_drawing(tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    given = ("--checkpoint", path, "--output", tmp_path / "out")
    line = refused(capsys, evaluate, *given, "--steps", 2, 40, "--count", 20)
    assert line.startswith(f"error: {path}: 40 steps: this checkpoint has a table of 20 noise")
    assert not (tmp_path / "out").exists()


def test_a_table_of_levels_goes_to_devices_without_float64(tmp_path, monkeypatch):
    pipeline(tmp_path / "p", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    checkpoint = load_checkpoint(path)
    z, levels = torch.randn(2, 1, 8, 8), checkpoint.levels(20)[:2]
    wanted = load_denoiser(checkpoint, path, CPU)(z, levels).x
    monkeypatch.setattr("diffusion.schedule.NO_FLOAT64", ("cpu",))
    network = build_network(checkpoint.config, CPU, dropout=0.0)
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}
    found = load_denoiser(checkpoint, path, CPU)(z, levels.float()).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_labels_cannot_be_dropped_where_no_row_means_no_class(tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20, num_class_embeds=10)
    classes = ("--set", "data.name=mnist", "model.num_classes=10")
    given = (tmp_path / "p", "--output", tmp_path / "x.safetensors", *classes)
    line = refused(capsys, import_diffusers, *given, "training.label_dropout=0.1")
    assert "training.label_dropout: 0.1, but this network has no input for images without" in line


def test_a_teacher_that_takes_no_weight_has_no_students_that_do(tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20, num_class_embeds=11)
    path = imported(tmp_path / "p", *MNIST, "model.num_classes=10", "training.label_dropout=0.1")
    asked = ("--set", "distillation.guidance=[0.0,1.0]", "distillation.ladder=[20,10]")
    given = ("--teacher_model_checkpoint", path, "--output", tmp_path / "out", *asked)
    line = refused(capsys, distill, *given)
    assert "distillation.guidance: a diffusers_unet takes no guidance weight" in line


def test_bad_arguments_are_one_line(tmp_path, capsys):
    pipeline(tmp_path / "p", num_steps=20)
    output = ("--output", tmp_path / "x.safetensors")
    for arguments, said in (
        ((tmp_path / "none", *output), "none: no such folder"),
        ((tmp_path / "p", "--output", tmp_path / "x.pt"), "ends in .safetensors"),
        ((tmp_path / "p", *output, "--set", "data.name=x"), "data.name: 'x' is not one of"),
        ((tmp_path / "p", *output, "--set", "model.guidance=true"), "takes no guidance weight"),
        ((tmp_path / "p", *output, "--set", "diffusion.schedule=cosine"), "the pipeline's own"),
    ):
        assert said in refused(capsys, import_diffusers, *arguments)


def test_without_diffusers_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    pipeline(tmp_path / "p", num_steps=20)
    path = imported(tmp_path / "p", *MNIST)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(capsys, sample, "--checkpoint", path)
    more = ("--output", tmp_path / "x.safetensors")
    assert "pip install diffusers" in refused(capsys, import_diffusers, tmp_path / "p", *more)
