import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import distill
import train
from benchmarks import ablation, cost, experiments, stages, steps, throughput
from evaluation.gallery import RealImages, real_images
from pipeline.build import build_network
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.config import load_config
from tests.toys import tiny


def test_the_benchmark_measures_what_it_says(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    output = tmp_path / "x.json"
    arguments = ["--config_path", str(config), "--rounds", "3", "--steps", "2"]
    assert throughput.main([*arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["ratios"].keys() == throughput.RATIOS.keys()
    assert all(ratio["median"] > 0 for ratio in result["ratios"].values())
    gflop = result["gflop_per_image"]
    # a backward pass is two forward passes, and two teacher forwards come on top of that
    assert gflop["training update"] == pytest.approx(3 * gflop["forward"], rel=0.1)
    assert gflop["distillation update"] == pytest.approx(5 * gflop["forward"], rel=0.1)
    layers = gflop["convolutions alone"] + gflop["matrix products alone"]
    assert layers == pytest.approx(gflop["training update"], rel=0.1)  # but for attention itself
    assert all(rate > 0 for rate in result["fastest_gflop_per_second"].values())
    assert "| training update |" in capsys.readouterr().out


def test_the_flop_counter_counts_a_matrix_product():
    bench = throughput.Bench.__new__(throughput.Bench)
    bench.batch_size = 1
    a = torch.zeros(10, 10)
    assert bench.gflop_of(lambda: a @ a) == pytest.approx(2 * 10**3 / 1e9)


def test_costs_are_counted_without_hardware(tmp_path, capsys):
    """The same arithmetic as a real network's, and the largest network in no memory."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    count = cost.cost_of(load_config(config, []))
    bench = throughput.Bench.__new__(throughput.Bench)
    bench.batch_size = 1
    network = build_network(load_config(config, []), torch.device("cpu"))
    counted = bench.gflop_of(lambda: network(torch.zeros(1, 1, 32, 32), torch.zeros(1)))
    assert count["parameters"] == sum(p.numel() for p in network.parameters())
    assert count["forward"] == pytest.approx(counted, rel=0.1)
    assert count["training"] == pytest.approx(3 * counted, rel=0.1)
    assert count["distillation"] == pytest.approx(count["training"] + 2 * count["forward"])
    arguments = ["--config_path", "configs/paper/imagenet64.yaml", "--gpus", "64"]
    assert cost.main(arguments) == 0
    assert "| imagenet64 | 295.9 |" in capsys.readouterr().out
    assert cost.main([*arguments, "--tflops", "0"]) == 2


@pytest.fixture
def small_base(tmp_path, monkeypatch):
    """A tiny config in the place of mnist_small's, and fewer real images."""
    base = tmp_path / "tiny.yaml"
    base.write_text(yaml.safe_dump(tiny()))

    def few(config):
        real = real_images(config)
        return RealImages(real.reference[:500], real.floor[:500], None)

    monkeypatch.setattr("evaluation.gallery.real_images", few)
    for module in (experiments, ablation):
        monkeypatch.setattr(module, "BASE", base)
        monkeypatch.setattr(module, "COMMON", ["training.learning_rate_decay=linear"])
    return ["--seconds", "1", "--count", "20", "--steps", "2", "--output", str(tmp_path / "out")]


def test_experiments_train_in_equal_time_and_go_on(small_base, tmp_path, monkeypatch, capsys):
    variants = {"small": ["training.batch_size=4"], "large": ["training.batch_size=32"]}
    monkeypatch.setattr(experiments, "VARIANTS", variants)
    assert experiments.main(small_base) == 0
    table = capsys.readouterr().out
    assert table.count("\n| small |") == table.count("\n| large |") == 1
    plans = [json.loads((tmp_path / f"out/{n}/plan.json").read_text()) for n in variants]
    assert all(0.5 < plan["updates"] * plan["per_update"] <= 1 for plan in plans)
    assert plans[0]["updates"] > plans[1]["updates"]
    monkeypatch.setattr(train, "main", lambda command: 1 / 0)
    assert experiments.main(small_base) == 0, "nothing is trained twice"
    assert table.endswith(capsys.readouterr().out)
    assert experiments.main([*small_base, "--count", "30"]) == 2, "not the same measure"
    assert "of 20 samples of 2 steps" in capsys.readouterr().err


def test_a_stage_is_distilled_by_every_recipe_in_equal_time(
    small_base, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    assert train.main(["--config_path", str(tmp_path / "tiny.yaml"), "--output", str(run)]) == 0
    teacher = ["--teacher_model_checkpoint", str(run / "diffusion-4.pt")]
    assert distill.main([*teacher, "--output", str(tmp_path / "ladder")]) == 0
    monkeypatch.setattr(stages, "VARIANTS", {"rate5": [], "b8": ["distillation.batch_size=8"]})
    monkeypatch.setattr(stages, "HELD_OUT", 200)
    given = [a for a in small_base if a not in ("--steps", "2")]
    given += ["--checkpoint", str(tmp_path / "ladder" / "student-4.pt")]
    capsys.readouterr()
    assert stages.main(given) == 0
    table = capsys.readouterr().out
    assert "| b8 | batch_size=8 | " in table
    told = json.loads((tmp_path / "out/b8/agreement.json").read_text())
    assert f" | {told['distance']:.5f} | {told['loss']:.6f} | " in table
    assert told["distance"] > 0
    plans = [json.loads((tmp_path / f"out/{n}/plan.json").read_text()) for n in ("rate5", "b8")]
    assert plans[0]["updates"] < plans[1]["updates"]
    teacher_path = tmp_path / "ladder" / "student-4.pt"
    trained = stages.held_out_loss(tmp_path / "out/b8/student-2.pt", teacher_path)
    copied = tmp_path / "copied.pt"
    save_checkpoint(copied, replace(load_checkpoint(teacher_path), num_steps=2))
    assert trained < stages.held_out_loss(copied, teacher_path), "its teacher's own weights"
    monkeypatch.setattr(distill, "main", lambda command: 1 / 0)
    assert stages.main(given) == 0, "nothing is distilled twice"
    given[-1] = str(copied)  # of other weights than those that the folder's students come from
    save_checkpoint(copied, replace(load_checkpoint(tmp_path / "out/b8/student-2.pt"), num_steps=4))
    assert stages.main(given) == 2
    assert "plan.json: planned for another checkpoint" in capsys.readouterr().err
    given[-1] = str(run / "diffusion-4.pt")
    assert stages.main(given) == 2
    assert "not a student of an even number of steps" in capsys.readouterr().err


def test_an_ablation_has_every_cell_and_the_best_twice(small_base, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "OUTPUTS", ("x", "v"))
    monkeypatch.setattr(ablation, "WEIGHTS", ("snr_trunc",))
    monkeypatch.setattr(ablation, "REPEATED", 1)
    trained = train.main

    def diverging(command):
        if "diffusion.prediction=x" not in command:
            return trained(command)
        folder = Path(command[command.index("--output") + 1])
        line = {"stage": 0, "update": 9, "skipped": True}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return 2

    monkeypatch.setattr(train, "main", diverging)
    assert ablation.main(small_base) == 0
    table = capsys.readouterr().out
    assert "| x | diverged |" in table
    row, course = [line for line in table.splitlines() if line.startswith("| v |")]
    assert row.count(" / ") == 2, "DDIM / ancestral, of two seeds"
    assert row.count(";") == 1
    assert row.count(" ± ") == 4, "each with its interval"
    assert course.count(" -> ") == 1


def test_the_error_of_each_step_is_told(small_base, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(["--config_path", str(tmp_path / "tiny.yaml"), "--output", str(run)]) == 0
    base = run / "diffusion-4.pt"
    ladder = tmp_path / "ladder"
    command = ["--teacher_model_checkpoint", str(base), "--output", str(ladder)]
    assert distill.main([*command, "--set", "distillation.time_exponent=3.0"]) == 0
    given = ["--checkpoint", str(ladder / "student-2.pt"), "--teacher"]
    capsys.readouterr()
    assert steps.main([*given, str(ladder / "student-4.pt"), "--count", "8"]) == 0
    rows = [line.replace(" ", "")[1:-1].split("|") for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[2:4]] == [["1", "1.000", "0.875"], ["0", "0.500", "0.125"]]
    errors = [float(row[-1]) for row in rows[2:]]
    assert min(errors) > 0
    assert steps.main([*given, str(base), "--count", "8"]) == 0, "a base model has any number"
    capsys.readouterr()
    assert steps.main([*given, str(ladder / "student-2.pt")]) == 2
    assert "not a student of" in capsys.readouterr().err
    copied = tmp_path / "copied.pt"
    teacher = load_checkpoint(ladder / "student-4.pt")
    save_checkpoint(copied, replace(teacher, num_steps=8))
    assert steps.main(["--checkpoint", given[1], "--teacher", str(copied)]) == 2
