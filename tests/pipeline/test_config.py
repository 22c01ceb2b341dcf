import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import distill
import train
from pipeline.build import build_network
from pipeline.checkpoint import load_checkpoint
from pipeline.config import (
    SECTIONS,
    Config,
    differences,
    load_config,
    make_config,
    override,
)
from pipeline.sections import DistillationConfig
from utils.command import InputError
from utils.strict_yaml import parse_yaml, read_yaml, write_yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def error_of(values):
    with pytest.raises(InputError) as caught:
        make_config(values, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_is_valid(path):
    load_config(path)


def test_the_tutorials_config_is_the_tutorials_recipe():
    path = CONFIGS / "ddpm_32x32_v_continuous.yaml"
    config = load_config(path)
    every = {name: set(keys) for name, keys in Config().model_dump().items() if name in SECTIONS}
    assert {name: set(keys) for name, keys in read_yaml(path).items() if name in SECTIONS} == every
    model = config.model
    assert model.resample == "plain"
    assert differences(config, Config(), tuple(Config.model_fields)) == ["model.resample"]
    network = build_network(config, torch.device("meta"))
    assert sum(p.numel() for p in network.parameters()) == 35_204_609
    assert (model.channels, model.channel_multipliers) == (128, (1, 2, 2, 2))
    assert (model.blocks_per_level, model.attention_resolutions) == (2, (16,))
    assert (model.attention_heads, model.dropout) == (2, 0.1)
    training = config.training
    assert (training.updates, training.batch_size, training.learning_rate) == (10000, 128, 2e-4)
    assert config.sampling.steps == 1024
    assert config.distillation.steps() == (1024, 512, 256, 128, 64, 32, 16, 8)
    recipe = {"method": "progressive", "updates_per_stage": 5000}
    recipe |= {"learning_rate": 1e-4, "time_exponent": 1.0}
    assert config.distillation.of_stage(0) == recipe


def test_a_config_without_resample_keeps_its_residual_blocks():
    network = build_network(make_config({"model": {}}, "x.yaml"), torch.device("meta"))
    assert sum(p.numel() for p in network.parameters()) == 42_850_817


@pytest.mark.parametrize(
    ("values", "key", "hint"),
    [
        ({"model": {"chanels": 8}}, "model.chanels", "did you mean channels"),
        ({"traning": {}}, "traning", "did you mean training"),
        ({"updates": 3}, "updates", "did you mean training.updates"),
        ({"model": {"channels": True}}, "model.channels", "valid integer"),
        ({"model": {"channels": 8.0}}, "model.channels", "valid integer"),
        ({"model": {"channels": "8"}}, "model.channels", "valid integer"),
        ({"model": {"channels": 0}}, "model.channels", "greater than or equal to 4"),
        ({"model": {"dropout": 1.0}}, "model.dropout", "less than 1"),
        ({"training": {"weight_decay": 1e300}}, "training.weight_decay", "less than or equal"),
        ({"training": {"learning_rate": 1e30}}, "training.learning_rate", "less than or equal"),
        ({"model": {"dropout": float("nan")}}, "model.dropout", "finite"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate", "finite"),
        ({"training": {"learning_rate": 0.0}}, "training.learning_rate", "greater than 0"),
        ({"training": {"updates": -1}}, "training.updates", "greater than or equal to 1"),
        ({"training": 3}, "training", "TrainingConfig"),
        ({"data": {"root": "a\0b"}}, "data.root", "not the name of a file"),
        ({"training": {"accumulate": 129}}, "training", "at most as many as there are images"),
        (
            {"model": {"channels": 8, "channel_multipliers": [1] * 6, "attention_resolutions": []}},
            "model.channel_multipliers",
            "one pixel",
        ),
        # 64 channels are two a group, but the blocks of one pixel begin with 32.
        (
            {
                "data": {"image_size": 16},
                "model": {
                    "channels": 32,
                    "channel_multipliers": [1, 1, 1, 1, 2],
                    "attention_resolutions": [],
                },
            },
            "model.channel_multipliers",
            "32 channels, one a group",
        ),
        ({"data": {"channels": 2}}, "data.channels", "1 or 3"),
        ({"data": {"name": "mnits"}}, "data.name", "mnist, fashion_mnist"),
        ({"diffusion": {"prediction": "u"}}, "diffusion.prediction", "x, eps, v, both"),
        ({"diffusion": {"logsnr_min": -20.5}}, "diffusion.logsnr_min", "or equal to -20"),
        ({"diffusion": {"logsnr_max": 20.5}}, "diffusion.logsnr_max", "less than or equal to 20"),
        (
            {"diffusion": {"clip": True}, "sampling": {"clip": False}},
            "sampling.clip",
            "false, but diffusion.clip: true clips everywhere",
        ),
        (
            {"distillation": {"losses": {"adversarial": 1.0}}},
            "distillation",
            "give another term beside it",
        ),
        (
            {"distillation": {"losses": {"adversarail": 1.0}}},
            "distillation.losses",
            "energy, adversarial",
        ),
        ({"sampling": {"sampler": "ddpm"}}, "sampling.sampler", "ddim, ancestral"),
        ({"data": {"image_size": 30}}, "data.image_size", "not divisible by 8"),
        ({"model": {"patch_size": 3}}, "data.image_size", "not divisible by 24"),
        ({"model": {"attention_resolutions": [5]}}, "model.attention_resolutions", "32, 16, 8, 4"),
        ({"model": {"attention_heads": 3}}, "model.attention_heads", "does not divide"),
        ({"model": {"attention_head_dim": 48}}, "model.attention_head_dim", "does not divide"),
        ({"model": {"channel_multipliers": []}}, "model.channel_multipliers", "at least 1"),
        ({"model": {"channel_multipliers": [1, 0]}}, "model.channel_multipliers.1", "1"),
        ({"distillation": {"first_steps": 12, "iterations": 4}}, "distillation", "halved"),
        (
            {"distillation": {"updates_per_stage": [5, 6]}},
            "distillation",
            "lists 2 stages, but iterations is 7",
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(values, key, hint):
    message = error_of(values)
    assert f": {key}: " in message
    assert hint in message


def test_all_errors_are_counted():
    assert "(and 1 more)" in error_of({"model": {"channels": 0, "dropout": 2.0}})


# --- YAML's traps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("010", 10),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        (".nan", ".nan"),
        (".inf", ".inf"),
        ("-.Inf", "-.Inf"),
        ("2024-01-01", "2024-01-01"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("seed: 1\nseed: 2\n", "line 2: seed is given twice"),
        ("model: {channels: 8, channels: 8}", "channels is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases"),
        ("a: &x [*x]", "aliases"),
        ("<<: {seed: 1}\nseed: [", "line 2"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("\t- a", "line 1"),
        ("a: " + "[" * 3000, "x: "),
        ("a: " + "9" * 5000, "x: "),
        ("? [a, b]\n: 1\n? {c: d}\n: 2", "x: "),
        ("\x00", "x: "),
        ("seed: !!bool maybe", "x: "),
        ("seed: !!timestamp abc", "x: "),
        ('seed: !!float ""', "x: "),
    ],
)
def test_bad_yaml_is_one_line(text, hint):
    with pytest.raises(InputError, match=re.escape(hint)) as caught:
        parse_yaml(text, "x")
    assert "\n" not in str(caught.value).strip()


def test_an_alias_bomb_does_no_harm():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(InputError, match="aliases"):
        parse_yaml("\n".join(lines), "x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=16),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
        ),
    )
)
def test_plain_yaml_reads_as_written(value):
    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b or str(a) == "inf" or str(a) == "-inf"

    assert same(value, parse_yaml(yaml.safe_dump(value), "x"))


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_one_error(text):
    with suppress(InputError):
        parse_yaml(text, "x")


# --- --set ----------------------------------------------------------------------------------


def test_set_overrides_and_is_checked_alike():
    values = override(
        {"model": {"channels": 8}}, ["model.channels=16", "training.updates=1", "seed=7"]
    )
    assert values == {"model": {"channels": 16}, "training": {"updates": 1}, "seed": 7}
    assert override({}, ["distillation.updates_per_stage=[1, 2]"]) == {
        "distillation": {"updates_per_stage": [1, 2]}
    }
    assert "model.channels" in error_of(override({}, ["model.channels=true"]))
    assert "did you mean" in error_of(override({}, ["model.chanels=8"]))
    given = {"distillation": {"student": {"channels": 8}}}
    changed = override(given, ["distillation.student.channels=16"])
    assert changed["distillation"]["student"] == {"channels": 16}
    assert given == {"distillation": {"student": {"channels": 8}}}, "a copy all the way down"


@pytest.mark.parametrize("item", ["model.channels", "=3", "seed.x=3", "model.channels.x=3", ""])
def test_a_malformed_set_is_one_line(item):
    with pytest.raises(InputError, match="--set"):
        override({"seed": 1, "model": {"channels": 8}}, [item])


def test_the_file_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(InputError, match=f"{path}: no such config"):
        load_config(path)
    path.write_text("seed: -1\n")
    with pytest.raises(InputError, match=f"{path}: seed: .*greater than or equal to 0"):
        load_config(path)
    with pytest.raises(InputError, match="did you mean"):
        load_config(tmp_path / "b.yaml")
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="not a mapping"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_config(path)
    with pytest.raises(InputError, match="folder"):
        load_config(tmp_path)
    path.write_text("")
    assert load_config(path) == Config()


# --- sections, files, printing ----------------------------------------------------------------


def test_a_section_whose_keys_are_all_commented_out_is_its_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 3\nmodel:\n  # channels: 8\ndata:\n")
    assert load_config(path) == Config(seed=3)
    path.write_text("model: {channels: 64}\n")
    assert load_config(path, ["model=null", "seed=3"]) == Config(seed=3)
    path.write_text("modle:\n")
    with pytest.raises(InputError, match="modle: unknown key; did you mean model"):
        load_config(path)
    path.write_text("seed:\n")
    with pytest.raises(InputError, match=r"seed: .*valid integer"):
        load_config(path)


def test_a_config_is_read_from_a_file_alone(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    for path in (tmp_path / "a.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{path}: not a regular file"):
            load_config(path)


def printed(capsys, script, *arguments):
    capsys.readouterr()
    assert script.main([*map(str, arguments), "--print_config"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_a_printed_config_is_read_back(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, train, "--config_path", path, "--set", "seed=7")
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(again) == load_config(path, ["seed=7"])
    assert list(parse_yaml(text, "x")) == list(Config.model_fields), "every section, in order"
    assert "{" not in text, "in blocks"
    assert printed(capsys, train, "--config_path", again) == text
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


TEACHER = CONFIGS.parent / "pretrained" / "mnist-teacher.safetensors"


def test_a_printed_config_is_that_of_the_ladder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ("--teacher_model_checkpoint", TEACHER, "--distillation_iterations", 3)
    settings = ("--set", "distillation.ladder=null", "distillation.updates_per_stage=[1, 2, 3]")
    settings += ("distillation.learning_rate=[1e-5, 2e-5, .1]", "distillation.time_exponent=1.0")
    text = printed(capsys, distill, *base, "--initial_sampling_steps", 32, *settings)
    config = make_config(parse_yaml(text, "x"), "x")
    stored = load_checkpoint(TEACHER).config
    assert (config.model, config.diffusion) == (stored.model, stored.diffusion)
    assert config.distillation.steps() == (64, 32, 16, 8)
    assert config.distillation.learning_rate == (1e-5, 2e-5, 0.1)
    assert not list(tmp_path.iterdir())
    too_many = ("--initial_sampling_steps", 10**19, "--print_config")
    too_many += ("--set", "distillation.ladder=null")
    assert distill.main([*map(str, (*base, *too_many))]) == 2
    assert "distillation.first_steps" in capsys.readouterr().err
    text = printed(capsys, distill, *base, "--initial_sampling_steps", 8)
    assert make_config(parse_yaml(text, "x"), "x").distillation.steps() == (16, 8, 4, 2)
    for number, error in ((6, "with 5 students from there on"), (0, "whole number"), (-2, "whole")):
        asked = ("--distillation_iterations", number, "--print_config")
        assert distill.main([*map(str, (*base[:2], *asked))]) == 2
        assert error in capsys.readouterr().err


NAMES = [
    "1e3",
    "010",
    "yes",
    "no",
    "null",
    "~",
    ".5",
    "1_0",
    "12:30",
    "2024-01-01",
    "true",
    "=",
    "a: b",
]
NAMES += [
    "- a",
    "#a",
    "'a'",
    '"',
    "a #b",
    "é中",
    "<<",
    "!a",
    "&a",
    "*a",
    "{a",
    "%a",
    "x" * 300,
    "a " * 99 + "a",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_printed_as_text(name):
    config = make_config({"data": {"root": name}, "output": name}, "x")
    assert make_config(parse_yaml(write_yaml(config.model_dump(mode="json")), "x"), "x") == config
    assert write_yaml(config.model_dump(mode="json")).isascii()


@given(st.text(min_size=1, max_size=20))
def test_printed_text_is_read_as_printed(text):
    try:
        config = make_config({"data": {"root": text}}, "x")
    except InputError:  # it is no path
        return
    written = write_yaml(config.model_dump(mode="json"))
    assert parse_yaml(written, "x")["data"]["root"] == text


# --- the ladder -----------------------------------------------------------------------------


@given(st.integers(1, 2**19), st.integers(1, 22))
def test_a_ladder_halves_or_is_refused(first_steps, iterations):
    if first_steps % 2 ** (iterations - 1):
        with pytest.raises(ValueError, match="cannot be halved"):
            DistillationConfig(first_steps=first_steps, iterations=iterations)
        return
    steps = DistillationConfig(first_steps=first_steps, iterations=iterations).steps()
    teacher, *ladder = steps
    assert teacher == 2 * first_steps
    ladder = tuple(ladder)
    assert ladder == tuple(first_steps // 2**n for n in range(iterations))
    assert ladder[-1] * 2 ** (iterations - 1) == first_steps


def test_updates_and_rates_are_numbers_or_lists():
    config = DistillationConfig(
        first_steps=4,
        iterations=2,
        updates_per_stage=[1, 2],
        learning_rate=[1e-4, 1e-3],
        time_exponent=[1.0, 3.0],
    )
    keys = ("updates_per_stage", "learning_rate", "time_exponent")
    assert [[config.of_stage(n)[k] for k in keys] for n in range(2)] == [
        [1, 1e-4, 1.0],
        [2, 1e-3, 3.0],
    ]
    plain = DistillationConfig(updates_per_stage=9)
    assert [plain.of_stage(6)[k] for k in keys] == [9, 1e-4, 1.0]
    with pytest.raises(ValueError, match="learning_rate lists 2 stages"):
        DistillationConfig(learning_rate=[1e-4, 1e-3])


def test_a_config_survives_json_and_tells_differences():
    config = make_config({"model": {"channels": 64}, "seed": 3}, "x")
    assert make_config(config.model_dump(mode="json"), "x") == config
    assert differences(config, Config(), ("seed", "data", "model")) == ["seed", "model.channels"]


# Salimans & Ho 2022, appendix: what they give of their settings, by key.
PAPER = {
    "cifar10": {
        "parameters": 60_004_099,
        "image": (32, 3),
        "model.channels": 256,
        "model.embedding_channels": 1024,
        "model.channel_multipliers": (1, 1, 1),
        "model.attention_resolutions": (8, 16),
        "model.attention_heads": 1,
        "model.attention_head_dim": None,
        "model.dropout": 0.2,
        "model.num_classes": None,
        "diffusion.prediction": "x",
        "training.batch_size": 128,
        "training.learning_rate": 2e-4,
        "training.weight_decay": 1e-3,
        "distillation.batch_size": 128,
        "distillation.learning_rate": 5e-5,
        "distillation.first_steps": 4096,
    },
    "imagenet64": {
        "parameters": 295_905_222,
        "image": (64, 3),
        "model.channels": 192,
        "model.embedding_channels": 768,
        "model.channel_multipliers": (1, 2, 3, 4),
        "model.attention_resolutions": (8, 16, 32),
        "model.attention_head_dim": 64,
        "model.dropout": 0.1,
        "model.num_classes": 1000,
        "diffusion.prediction": "both",
        "training.batch_size": 2048,
        "training.learning_rate": 3e-4,
        "training.weight_decay": 0.0,
        "distillation.batch_size": 2048,
        "distillation.learning_rate": 1e-4,
        "distillation.first_steps": 512,
    },
}
PAPER["lsun128"] = PAPER["imagenet64"] | {
    "parameters": 139_578_502,
    "image": (128, 3),
    "model.channels": 64,
    "model.channel_multipliers": (1, 2, 4, 6, 8),
    "model.num_classes": None,
}
PAPER_ALWAYS = {
    "model.blocks_per_level": 3,
    "model.resample": "block",
    "model.patch_size": 1,
    "diffusion.schedule": "cosine",
    "diffusion.logsnr_min": -20.0,
    "diffusion.logsnr_max": 20.0,
    "diffusion.loss_weight": "snr_trunc",
    "training.learning_rate_decay": "none",
    "training.times": "uniform",
    "training.warmup": 1000,
    "training.ema_decay": 0.9999,
    "training.gradient_clip": 1.0,
    "distillation.gradient_clip": 1.0,
    "distillation.loss_weight": "snr_trunc",
    "distillation.time_exponent": 1.0,
    "data.horizontal_flip": True,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configs_are_the_papers(name):
    config = load_config(CONFIGS / "paper" / f"{name}.yaml", [])
    expected = PAPER_ALWAYS | PAPER[name]
    network = build_network(config, torch.device("meta"))
    assert sum(p.numel() for p in network.parameters()) == expected.pop("parameters")
    assert (config.data.image_size, config.data.channels) == expected.pop("image")
    for key, value in expected.items():
        section, _, field = key.partition(".")
        assert getattr(getattr(config, section), field) == value, key
    ladder = config.distillation.steps()[1:]
    assert ladder[-1] == 1
    updates = [config.distillation.of_stage(n)["updates_per_stage"] for n in range(len(ladder))]
    assert updates == [50_000] * (len(ladder) - 2) + [100_000] * 2
