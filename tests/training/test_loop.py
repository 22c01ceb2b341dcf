import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from torch import nn

from diffusion.gaussian import OUTPUT_TYPES, Denoiser, Prediction
from diffusion.grids import uniform_grid
from diffusion.losses import SQUARED_ERRORS, Example, weighted_sum
from diffusion.objectives import Objective, denoising_objective, distillation_objective
from diffusion.paths import neighbours
from models.critic import Critic
from pipeline.build import build_denoiser
from pipeline.checkpoint import Checkpoint
from pipeline.codec import encode
from pipeline.config import make_config
from pipeline.data import MemoryDataset
from pipeline.network import build_network, load_weights
from tests.toys import COSINE, tiny
from training.loop import Callbacks, rows_of_process, run_stage, train_updates
from training.metrics import LossBins, MetricsLog, read_metrics, sample_statistics
from training.resume import StageFiles, require_same_everywhere
from training.stage import base_stage, student_stages
from training.stages import train_stage
from training.starts import Run, base_start, features_of, student_start
from training.trainee import ema_decay_at, load_optimizer, make_optimizer, make_trainee, update_ema
from utils.command import DataError, InputError
from utils.processes import World
from utils.randomness import ImageNoise, batch_indices, generator

CPU = torch.device("cpu")
ALONE = World(CPU)


def digits(count=32, channels=1):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, 32, 32), generator=rng, dtype=torch.uint8)
    return MemoryDataset(images, torch.arange(count) % 10, 10)


def make_stage(**changes):
    values = {
        "updates": 4,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "decays": False,
        "warmup": 0,
        "gradient_clip": 1.0,
        "checkpoint_every": 2,
        "ema_decay": 0.99,
        "conditional": False,
    }
    return replace(base_stage(make_config(tiny(), "x")), **values | changes)


def begin(config, seed=0):
    """A trainee with fresh weights."""
    torch.manual_seed(seed)
    network = build_network(config, CPU)
    return make_trainee(network, make_stage(), ALONE, config.engine)


def base_objective(denoiser, weight="snr_plus_one", **options):
    return denoising_objective(denoiser, COSINE, SQUARED_ERRORS[weight], **options)


def student_objective(student, teacher, num_steps, weight="snr_trunc", time_exponent=1.0):
    """Of two teacher's steps in one."""
    paths = neighbours(uniform_grid(COSINE, 2 * num_steps), uniform_grid(COSINE, num_steps))
    loss = weighted_sum({weight: 1.0})
    return distillation_objective(student, [teacher] * 2, paths, loss, time_exponent)


def train_base(run):
    return train_stage(run, base_stage(run.config), base_start(run))


def train_student(run, teacher, position):
    stage = student_stages(run.config)[position]
    return train_stage(run, stage, student_start(run, stage, teacher), teacher)


# --- EMA ------------------------------------------------------------------------------------


def test_ema_averages_parameters_and_copies_buffers():
    ema, network = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        ema.weight.fill_(1.0)
        network.weight.fill_(3.0)
    network.running_mean.fill_(5.0)
    network.num_batches_tracked.fill_(7)
    update_ema(ema, network, decay=0.75)
    assert torch.equal(ema.weight, torch.tensor([1.5, 1.5]))
    assert torch.equal(ema.running_mean, torch.tensor([5.0, 5.0]))
    assert ema.num_batches_tracked == 7
    assert torch.equal(network.weight, torch.tensor([3.0, 3.0]))


def test_ema_forgets_the_initialisation_in_short_runs():
    assert ema_decay_at(0.9999, 0) == 0.1
    assert ema_decay_at(0.9999, 10**6) == 0.9999
    kept = math.prod(ema_decay_at(0.9999, n) for n in range(1000))
    assert kept < 1e-12


# --- learning rates -------------------------------------------------------------------------


def test_moments_saved_on_another_kind_of_device_fit_the_parameters():
    """GPUs' networks are channels_last, CPUs' are not; fused Adam reads memory as it lies."""
    one, two = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def step(network, optimizer):
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    first, second = make_optimizer(one), make_optimizer(two)
    step(one, first)
    two.load_state_dict(one.state_dict())
    stored = copy.deepcopy(first.state_dict())
    moments = stored["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = moments[name].to(memory_format=torch.channels_last)
    load_optimizer(second, stored)
    assert second.state[two.weight]["exp_avg"].stride() == two.weight.stride()
    step(one, first)
    step(two, second)
    assert torch.equal(one.weight, two.weight)


def test_learning_rates():
    training = {"updates": 100, "learning_rate": 1.0, "warmup": 10}
    constant = base_stage(make_config(tiny(training=training), "x"))
    rates = [constant.rate_at(update) for update in (0, 4, 9, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0])
    training["learning_rate_decay"] = "linear"
    falling = base_stage(make_config(tiny(training=training), "x"))
    assert falling.rate_at(50) == pytest.approx(0.5)
    recipe = {"updates_per_stage": 4, "learning_rate": 2.0}
    student, _ = student_stages(make_config(tiny(distillation=recipe), "x"))
    assert [student.rate_at(k) for k in range(4)] == [2.0, 1.5, 1.0, 0.5]
    student, _ = student_stages(make_config(tiny(distillation=recipe | {"warmup": 4}), "x"))
    assert [student.rate_at(k) for k in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_a_critic_learns_at_a_rate_of_its_own():
    network, critic = nn.Linear(2, 2), Critic([2])
    stage = make_stage(learning_rate=0.0, ema_decay=None)
    trainee = make_trainee(network, stage, ALONE, critic=critic)
    before = [[p.clone() for p in group] for group in trainee.parameters]
    assert [len(group) for group in before] == [2, len(list(critic.parameters()))]
    for parameter in (p for group in trainee.parameters for p in group):
        parameter.grad = torch.ones_like(parameter)
    trainee.step(stage, rate=0.0)
    moved = [
        [(now - was).abs().max().item() for now, was in zip(group, old, strict=True)]
        for group, old in zip(trainee.parameters, before, strict=True)
    ]
    assert moved[0] == [0.0, 0.0]
    assert moved[1] == pytest.approx([1e-3] * len(moved[1]), rel=0.01)


# --- what an update draws -------------------------------------------------------------------


def test_batches_are_permutations_end_to_end():
    seen = torch.cat([batch_indices(10, 4, seed=1, stage=0, update=u) for u in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    assert torch.equal(batch_indices(10, 4, 1, 0, 3), seen[12:16])
    assert sorted(batch_indices(3, 9, 1, 0, 0).tolist()) == sorted([0, 1, 2] * 3)


def test_a_generator_is_a_function_of_its_key():
    draws = [
        torch.randn(3, generator=generator("cpu", *key)).tolist()
        for key in ((1, 23), (12, 3), (1, 23))
    ]
    assert draws[0] == draws[2] != draws[1]


def test_the_noise_of_an_image_is_a_function_of_seed_and_index():
    together = ImageNoise(3, range(6), (1, 4, 4), CPU)
    apart = ImageNoise(3, [4], (1, 4, 4), CPU)
    for _ in range(2):  # where a sampler starts, and what it adds
        assert torch.equal(together.draw()[4], apart.draw()[0])
    other = ImageNoise(4, [4], (1, 4, 4), CPU).draw()
    assert not torch.equal(other, ImageNoise(3, [4], (1, 4, 4), CPU).draw())


def test_the_student_trains_at_every_step_and_at_t_1():
    """Step i means t = (i + 1)/N: t = 1, where sampling starts, is trained; s is never negative."""
    seen = set()

    def network(z, logsnr):
        seen.update(logsnr.tolist())
        return torch.zeros_like(z)

    denoiser = Denoiser(network, "v")
    objective = student_objective(denoiser, denoiser, 4)
    x = torch.zeros(256, 1, 2, 2)
    objective.loss(x, {}, objective.draw(generator("cpu", 0), x.shape))
    t = torch.arange(1, 9, dtype=torch.float64) / 8
    expected = sorted(COSINE(t).float().tolist())
    assert sorted(seen) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("exponent", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_a_students_steps_are_drawn_as_their_density_says(num_steps, exponent):
    """P(i) = ((i + 1) / N)^p - (i / N)^p."""
    nobody = Denoiser(lambda z, logsnr: z, "v")
    objective = student_objective(nobody, nobody, num_steps, time_exponent=exponent)
    n = 4096
    i = objective.draw(generator("cpu", 0), torch.Size([n, 1, 1, 1]))["i"]
    edges = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps) ** exponent
    expected = n * edges.diff()
    counts = torch.bincount(i, minlength=num_steps)
    assert len(counts) == num_steps
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


@pytest.mark.parametrize("stratified", [False, True])
def test_base_times_are_continuous(stratified):
    seen = []

    def network(z, logsnr):
        seen.append(logsnr)
        return torch.zeros_like(z)

    objective = base_objective(Denoiser(network, "v"), stratified=stratified)
    x = torch.zeros(4096, 1, 1, 1)
    objective.loss(x, {}, objective.draw(generator("cpu", 0), x.shape))
    logsnr = seen[0]
    assert len(logsnr.unique()) > 4000
    t = (torch.atan(torch.exp(-logsnr / 2)) / (torch.pi / 2)).sort().values
    furthest = (t - torch.linspace(0, 1, 4096)).abs().max()
    assert furthest < (0.001 if stratified else 0.03)


def test_labels_are_dropped_as_often_as_asked():
    seen = []

    def network(z, logsnr, label):
        seen.append(label)
        return torch.zeros_like(z)

    x, labels = torch.zeros(4096, 1, 1, 1), torch.full((4096,), 7)
    for share in (0.0, 0.25):
        objective = base_objective(Denoiser(network, "v"), label_dropout=share)
        drawn = objective.draw(generator("cpu", 0), x.shape)
        losses, logsnr = objective.loss(x, {"label": labels}, drawn)
        assert losses.shape == logsnr.shape == (4096,)
        assert set(seen[-1].unique().tolist()) <= {-1, 7}
        assert (seen[-1] == -1).float().mean().item() == pytest.approx(share, abs=0.02)


def test_student_and_teacher_are_told_the_labels():
    seen = {"student": [], "teacher": []}

    def network_of(name):
        def network(z, logsnr, label):
            seen[name].append(label)
            return torch.zeros_like(z)

        return network

    student, teacher = (Denoiser(network_of(name), "v") for name in seen)
    objective = student_objective(student, teacher, 4)
    x, labels = torch.zeros(6, 1, 2, 2), torch.arange(6)
    objective.loss(x, {"label": labels}, objective.draw(generator("cpu", 0), x.shape))
    assert [len(calls) for calls in seen.values()] == [1, 2]
    assert all(torch.equal(label, labels) for calls in seen.values() for label in calls)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_labels_of_a_conditional_run_are_its_images_own(stage):
    """Of a run of the config: training as stage 0, distillation as stage 1."""
    seen = []

    def loss(x, condition, drawn):
        seen.append((x, condition.get("label")))
        output = trainee.network(x, torch.zeros(len(x)), **condition)
        return output.square().mean((1, 2, 3)), drawn["zeros"]

    for num_classes in (10, None):
        config = make_config(tiny(model={"num_classes": num_classes}), "x")
        images = digits()
        trainee = begin(config)
        made = (base_stage(config), *student_stages(config))[stage]
        plan = replace(made, updates=2, learning_rate=0.0)
        objective = Objective(lambda rng, shape: {"zeros": torch.zeros(shape[0])}, loss)
        for _ in train_updates(trainee, plan, images, objective, ALONE):
            pass
    with_classes, without = seen[:2], seen[2:]
    for x, labels in with_classes:
        for image, label in zip(x, labels, strict=True):
            same = (encode(images.images) == image).flatten(1).all(1)
            assert label in images.labels[same]
    assert all(labels is None for _, labels in without)


# --- the loop -------------------------------------------------------------------------------


def test_training_lowers_the_loss():
    config = make_config(tiny(model={"patch_size": 2, "attention_resolutions": []}), "x")
    trainee, plan = begin(config), make_stage(updates=60, learning_rate=1e-2)
    images = digits()
    images.images.fill_(200)
    losses = base_objective(build_denoiser(config, trainee.network, CPU), "snr_plus_one")
    history = [m.loss for m in train_updates(trainee, plan, images, losses, ALONE)]
    assert len(history) == trainee.update == 60
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


def linear(stage, *gradients):
    """A network of one weight, 3, after steps with these gradients, and its history: 3, w1, .."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 3.0)
    trainee, history = make_trainee(network, stage, ALONE), [3.0]
    for gradient in gradients:
        network.weight.grad = torch.full((1, 1), gradient)
        trainee.step(stage, 0.1)
        trainee.update += 1
        history.append(network.weight.item())
    return trainee, history


def test_each_average_follows_the_weights_by_its_own_decay():
    stage = make_stage(ema_decay=0.15, walker_decay=0.5)
    trainee, (start, first, second) = linear(stage, 1.0, -5.0)
    assert start > first != second
    average = 0.1 * start + 0.9 * first  # (1 + n) / (10 + n) is smaller at first
    assert trainee.ema.weight.item() == pytest.approx(0.15 * average + 0.85 * second)
    assert trainee.walker.weight.item() == pytest.approx(0.25 * start + 0.25 * first + 0.5 * second)


def test_weights_decay_towards_zero_and_are_pulled_to_where_they_began():
    """Both decoupled from Adam, whose first step is the rate against the gradient's sign."""
    _, (_, plain) = linear(make_stage(), 2.0)
    assert plain == pytest.approx(3.0 - 0.1)
    _, (_, decayed) = linear(make_stage(weight_decay=0.5), 2.0)
    assert decayed == pytest.approx(3.0 * (1 - 0.1 * 0.5) - 0.1)
    _, (_, pulled) = linear(make_stage(pull=0.5), 2.0)
    assert pulled == pytest.approx(plain + 0.1 * 0.5 * (3.0 - plain))


def test_an_update_is_a_function_of_seed_stage_and_update():
    """Two halves in two processes' worth of state are one whole, dropout included."""
    config = make_config(tiny(model={"dropout": 0.5}), "x")

    def run(trainee, last):
        losses = base_objective(build_denoiser(config, trainee.network, CPU), "snr_plus_one")
        return list(
            train_updates(
                trainee, make_stage(updates=last, horizontal_flip=True), digits(), losses, ALONE
            )
        )

    whole, halves = begin(config), begin(config)
    run(whole, 4)
    run(halves, 2)
    torch.rand(100)  # what happens in between is of no account
    resumed = begin(config, seed=9)
    resumed.network.load_state_dict(halves.network.state_dict())
    resumed.ema.load_state_dict(halves.ema.state_dict())
    resumed.optimizer.load_state_dict(halves.optimizer.state_dict())
    resumed.update = 2
    run(resumed, 4)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_horizontal_flip_flips_half_of_the_images():
    seen = []

    def loss(x, condition, drawn):
        seen.append(x)
        return x.mean((1, 2, 3)) * parameter, torch.zeros(len(x))

    losses = Objective(lambda rng, shape: {}, loss)

    parameter = nn.Parameter(torch.ones(()))
    module = nn.ParameterList([parameter])
    one = MemoryDataset(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1), None)
    one.images[..., 0] = 255
    stage = make_stage(updates=1, batch_size=400, horizontal_flip=True)
    list(train_updates(make_trainee(module, stage, ALONE), stage, one, losses, ALONE))
    left, right = ((seen[0][:, 0, 0, column] == 1).sum().item() for column in (0, -1))
    assert left + right == 400
    assert 150 < left < 250


@pytest.mark.parametrize("lasting", [False, True])
def test_an_update_whose_gradient_is_not_finite_is_skipped(lasting, capsys):
    config = make_config(tiny(), "x")
    trainee = begin(config)
    before = copy.deepcopy(trainee.network.state_dict())
    fine = base_objective(build_denoiser(config, trainee.network, CPU), "snr_trunc")

    def loss(*inputs):
        value, logsnr = fine.loss(*inputs)
        return value * (torch.inf if lasting or trainee.update == 1 else 1.0), logsnr

    objective = Objective(fine.draw, loss)
    steps = train_updates(trainee, make_stage(updates=50), digits(), objective, ALONE)
    if not lasting:
        metrics = [next(steps) for _ in range(3)]
        assert [m.skipped for m in metrics] == [False, True, False]
        assert all(p.isfinite().all() for p in trainee.network.parameters())
        said = capsys.readouterr().err
        assert "stage 0, update 1: the gradient is not finite; skipped (logsnr between" in said
        return
    with pytest.raises(InputError, match="for the 20th time in a row; begin anew"):
        list(steps)
    after = trainee.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("weight", SQUARED_ERRORS)
@pytest.mark.parametrize("prediction", OUTPUT_TYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_output_and_loss_trains_and_distils(weight, prediction, channels):
    values = tiny(data={"channels": channels}, diffusion={"prediction": prediction})
    config = make_config(values, "x")
    trainee = begin(config)
    denoiser = build_denoiser(config, trainee.network, CPU)
    teacher = build_denoiser(config, build_network(config, CPU), CPU)
    for losses in (
        base_objective(denoiser, weight),
        student_objective(denoiser, teacher, 4, weight),
    ):
        trainee.update = 0
        history = list(
            train_updates(trainee, make_stage(updates=2), digits(channels=channels), losses, ALONE)
        )
        assert all(math.isfinite(m.loss) and m.loss > 0 for m in history)


# --- stages ---------------------------------------------------------------------------------


def test_a_student_has_no_dropout_and_no_average(tmp_path, monkeypatch):
    config = make_config(tiny(model={"dropout": 0.5}), "x")
    run = Run(config, "x", tmp_path, ALONE, digits())
    teacher = train_base(run)
    built = []

    def spy(denoiser, *others):
        built.append(denoiser.network)
        return distillation_objective(denoiser, *others)

    monkeypatch.setattr("training.stages.distillation_objective", spy)
    student = train_student(run, teacher, 0)
    assert student.ema is None
    assert student.num_steps == 4
    dropouts = [m for m in built[0].modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert all(m.p == 0 for m in dropouts)


def of_some_example(loss):
    """What a loss says of an example whose parts all differ."""
    x_hat, eps_hat, x_target, eps_target, x = torch.randn(5, 4, 1, 16, 16)
    level = torch.tensor([-2.0, 1.0, 3.0, 5.0])
    end = torch.full((4,), torch.inf)
    return loss(
        Example(Prediction(x_hat, eps_hat), Prediction(x_target, eps_target), x, level, end)
    )


def test_a_base_models_objective_is_that_of_its_config(tmp_path, monkeypatch):
    training = {"times": "stratified", "label_dropout": 0.25, "updates": 1}
    model = {**tiny()["model"], "num_classes": 10}
    values = tiny(training=training, model=model, diffusion={"loss_weight": "snr_trunc"})
    made = []

    def spy(denoiser, schedule, loss, **options):
        made.append((schedule, loss, options))
        return denoising_objective(denoiser, schedule, loss, **options)

    monkeypatch.setattr("training.stages.denoising_objective", spy)
    config = make_config(values, "x")
    train_base(Run(config, "x", tmp_path, ALONE, digits()))
    ((schedule, loss, options),) = made
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(schedule(t), COSINE(t))
    torch.manual_seed(0)
    found = of_some_example(loss)
    torch.manual_seed(0)
    assert torch.equal(found, of_some_example(SQUARED_ERRORS["snr_trunc"]))
    assert options == {"stratified": True, "label_dropout": 0.25}


def test_a_students_objective_is_that_of_its_config(tmp_path, monkeypatch):
    weights = {"snr_trunc": 2.0, "energy": 0.5}
    distillation = {
        "ladder": [8, 2],
        "losses": {**weights, "adversarial": 0.25},
        "time_exponent": 3.0,
        "guidance": [0.5, 2.0],
        "updates_per_stage": 1,
    }
    config = make_config(
        tiny(
            model={**tiny()["model"], "num_classes": 10},
            training={"label_dropout": 0.1},
            distillation=distillation,
        ),
        "x",
    )
    run = Run(config, "x", tmp_path, ALONE, digits())
    teacher = train_base(run)
    made = []

    def spy(*arguments):
        made.append(arguments)
        return distillation_objective(*arguments)

    monkeypatch.setattr("training.stages.distillation_objective", spy)
    features = features_of(config, (Path("base.pt"), teacher), CPU)
    train_student(replace(run, features=features), teacher, 0)
    ((_, legs, paths, loss, exponent, guidance, adversary),) = made
    assert len(legs) == 4
    assert torch.equal(paths, neighbours(uniform_grid(COSINE, 8), uniform_grid(COSINE, 2)))
    torch.manual_seed(0)
    found = of_some_example(loss)
    torch.manual_seed(0)
    torch.testing.assert_close(found, of_some_example(weighted_sum(weights)))
    assert exponent == 3.0
    assert guidance == (0.5, 2.0)
    assert adversary.weight == 0.25


def test_a_student_starts_as_its_teachers_average(tmp_path, monkeypatch):
    config = make_config(tiny(), "x")
    run = Run(config, "x", tmp_path, ALONE, digits())
    teacher = train_base(run)
    assert teacher.ema is not None
    started = []

    def stop(trainee, *args, **kwargs):
        started.append({k: v.clone() for k, v in trainee.network.state_dict().items()})
        assert not trainee.optimizer.state, "a fresh optimiser"

    monkeypatch.setattr("training.stages.run_stage", stop)
    train_student(run, teacher, 0)
    assert all(torch.equal(started[0][key], value) for key, value in teacher.ema.items())
    assert any(not torch.equal(value, teacher.model[key]) for key, value in teacher.ema.items())


def test_the_rate_falls_to_zero_in_every_stage(tmp_path):
    rates = [1e-3, 4e-4]
    config = make_config(
        tiny(distillation={"updates_per_stage": [4, 2], "learning_rate": rates}), "x"
    )
    run = Run(config, "x", tmp_path, ALONE, digits())
    teacher = train_base(run)
    first = train_student(run, teacher, 0)
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "training.stages.load_weights", lambda *a: started.append(a[1]) or load_weights(*a)
        )
        train_student(run, first, 1)
    assert started
    assert all(weights is first.model for weights in started), "a student's raw weights"
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in line]
    found = {stage: [m["learning_rate"] for m in lines if m["stage"] == stage] for stage in (1, 2)}
    assert found[1] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert found[2] == pytest.approx([4e-4, 2e-4])


def test_metrics_drop_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 0, 0) as log:
        for stage, update in [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]:
            log.write(update, {"loss": 1.0}, stage=stage)
    with path.open("a") as file:
        file.write('foo}\n{"a": 1}\n[1]\n{"stage": 2, "upd')  # a kill in the middle of a line
    with MetricsLog(tmp_path, 1, 1) as log:
        log.write(2, {"loss": 0.5, "gradient_norm": math.nan}, stage=1)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["stage"], e["update"]) for e in entries] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert entries[-1] == {"stage": 1, "update": 2, "loss": 0.5, "gradient_norm": None}
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "stage-1"))
    assert [e.value for e in events.Reload().Scalars("loss")] == [0.5]


def test_curves_go_on_where_a_run_does(tmp_path):
    """TensorBoard keeps what the checkpoint has, its own update too, and no more."""
    for done, then in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsLog(tmp_path, 0, done) as log:
            for update in then:
                log.write(update, {"loss": done + update / 10}, stage=0)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "stage-0"))
    losses = {e.step: round(e.value, 3) for e in events.Reload().Scalars("loss")}
    assert losses == {1: 0.1, 2: 0.2, 3: 2.3, 4: 2.4}


def test_losses_are_averaged_by_noise_level():
    bins = LossBins(CPU)
    bins.add(torch.tensor([1.0, 3.0]), torch.tensor([-19.0, -17.0]).double())
    bins.add(torch.tensor([5.0, 7.0, 9.0]), torch.tensor([0.5, 25.0, -25.0]))
    means = {"loss_logsnr_-20": 13 / 3, "loss_logsnr_0": 5.0, "loss_logsnr_16": 7.0}
    assert bins.read(ALONE) == pytest.approx(means)
    assert bins.read(ALONE) == {}


@pytest.mark.parametrize(("rank", "done"), [(0, "saved"), (1, "ended")])
def test_only_the_leader_says_that_it_saved(tmp_path, rank, done):
    """The others have nothing to save, and the leader is waiting for them."""

    class OfTwo(World):
        def sum(self, values):
            return values

    class Damaged(MemoryDataset):
        def batches(self, index_batches):
            yield next(super().batches(index_batches))
            raise DataError("bad.png: not a readable image")

    config, saves = make_config(tiny(), "x"), []
    trainee, images = begin(config), digits()
    damaged = Damaged(images.images, images.labels, images.num_classes)
    objective = base_objective(Denoiser(trainee.network, "v"))
    callbacks = Callbacks(lambda: saves.append(trainee.update))
    stage, world = make_stage(), OfTwo(CPU, rank, size=2)
    with pytest.raises(InputError, match=f"bad.png: not a readable image; {done} at update 1 of 4"):
        run_stage(trainee, stage, damaged, objective, world, tmp_path, callbacks, "x")
    assert saves == ([1] if done == "saved" else [])


def test_a_file_that_differs_between_machines_is_refused():
    class Elsewhere(World):
        def agree(self, value):
            return value + 1

        def any(self, flag):
            return flag

    given = Path("x.pt"), {"weight": torch.ones(3)}
    require_same_everywhere(*given, ALONE)
    with pytest.raises(InputError, match=r"x\.pt: not the same file on all machines"):
        require_same_everywhere(*given, Elsewhere(CPU, 0, 2))


def test_the_scale_of_fp16_goes_on_where_it_was():
    """Begun anew at its default it would skip updates until it fits."""
    config = make_config(tiny(engine={"precision": "fp16"}), "x")
    first, second = begin(config), begin(config)
    assert first.scaler.is_enabled()
    first.scaler.scale(torch.ones(1))  # or it has none yet
    first.scaler.update(8.0)
    stored = Checkpoint("base", "x", config, stage=0, **first.state())
    second.restore(stored, Path("x.pt"))
    assert second.scaler.get_scale() == 8.0


def test_sample_statistics():
    images = torch.tensor([0, 0, 255, 51], dtype=torch.uint8).reshape(1, 1, 2, 2)
    statistics = sample_statistics(images)
    assert statistics["samples_mean"] == pytest.approx((-1 - 1 + 1 - 0.6) / 4)
    assert statistics["samples_clipped"] == 0.75
    assert statistics["samples_variance"] == pytest.approx(images.float().var() / 127.5**2)


@pytest.mark.parametrize(("keep", "milestone"), [(None, None), (2, None), (2, 3)])
def test_old_checkpoints_go_and_milestones_stay(tmp_path, keep, milestone):
    for number in range(1, 11):
        (tmp_path / f"diffusion-{number}.pt").touch()
    StageFiles(tmp_path, None, keep, milestone).prune(finished=False)
    left = {int(p.stem.split("-")[1]) for p in tmp_path.iterdir()}
    kept = set(range(1, 11)) if keep is None else {9, 10}
    assert left == kept | ({3, 6, 9} if milestone else set())


# --- several processes and steps of accumulation ----------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 7, 64])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (1, 3), (2, 1), (4, 1), (2, 2)])
def test_the_rows_of_all_processes_are_the_batch(batch_size, size, accumulate):
    worlds = [World(CPU, rank, size) for rank in range(size)]
    rows = [row for world in worlds for row in rows_of_process(batch_size, accumulate, world)]
    assert len(rows) == size * accumulate
    assert [n for row in rows for n in range(row.start, row.stop)] == list(range(batch_size))
    assert all(row.stop > row.start for row in rows)


def test_a_batch_too_small_to_be_shared_is_refused():
    with pytest.raises(InputError, match="batch_size: 3 cannot be shared by 2 processes"):
        rows_of_process(3, 2, World(CPU, 0, 2))


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulate):
    config = make_config(tiny(model={"dropout": 0.0}), "x")

    def run(accumulate):
        trainee = begin(config)
        objective = base_objective(build_denoiser(config, trainee.network, CPU), "snr_plus_one")
        plan = make_stage(accumulate=accumulate, updates=3, horizontal_flip=True)
        return trainee, list(train_updates(trainee, plan, digits(), objective, ALONE))

    (whole, metrics), (parts, same) = run(1), run(accumulate)
    for a, b in zip(metrics, same, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_keeps_the_loss_in_float32(precision):
    config = make_config(tiny(engine={"precision": precision}, model={"dropout": 0.0}), "x")
    full = make_config(tiny(model={"dropout": 0.0}), "x")

    def run(config):
        trainee = begin(config)
        seen = []
        trainee.network.register_forward_hook(lambda *inputs: seen.append(inputs[2].dtype))
        denoiser = build_denoiser(config, trainee.network, CPU)
        prediction = denoiser(torch.zeros(1, 1, 32, 32), torch.zeros(1))
        assert prediction.x.dtype == torch.float32
        objective = base_objective(denoiser, "snr_plus_one")
        history = list(train_updates(trainee, make_stage(updates=6), digits(), objective, ALONE))
        assert all(p.dtype == torch.float32 for p in trainee.network.parameters())
        return seen[0], [m.loss for m in history]

    dtype, losses = run(config)
    assert dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert losses == pytest.approx(run(full)[1], rel=0.02)


@pytest.mark.slow
def test_a_compiled_update_is_the_eager_one():
    def run(compile):
        config = make_config(tiny(engine={"compile": compile}, model={"dropout": 0.0}), "x")
        trainee = begin(config)
        denoiser = build_denoiser(config, trainee.network, CPU)
        objective = base_objective(denoiser, "snr_plus_one")
        return [m.loss for m in train_updates(trainee, make_stage(), digits(), objective, ALONE)]

    assert run(True) == pytest.approx(run(False), rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_that_of_the_mean_over_the_batch(accumulate):
    """Adam hides its length, but clipping and the figures of a run do not."""
    network = nn.Linear(1, 1, bias=False)

    def losses(x, condition, drawn):
        loss = network.weight.flatten().expand(len(x)) * drawn["slope"]
        return loss, torch.zeros(len(x))

    slopes = torch.arange(8.0)
    objective = Objective(lambda rng, shape: {"slope": slopes}, losses)
    for limit, clipped in ((1.0, 1.0), (9.0, 3.5), (None, 3.5)):
        stage = make_stage(updates=1, accumulate=accumulate, gradient_clip=limit)
        trainee = make_trainee(network, stage, ALONE)
        (metrics,) = train_updates(trainee, stage, digits(), objective, ALONE)
        assert metrics.gradient_norm == pytest.approx(slopes.mean().item()) == 3.5
        assert network.weight.grad.norm().item() == pytest.approx(clipped)
