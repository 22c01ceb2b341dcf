import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

import distill
import train
from benchmarks import (
    background,
    cost,
    diffusers_pipeline,
    gpu,
    latency,
    measures,
    onnx_variants,
    steps,
    sweep,
    throughput,
)
from benchmarks.sweeps import SWEEPS
from diffusion.grids import uniform_grid
from evaluation.gallery import RealImages, real_images
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.config import load_config, make_config
from pipeline.network import build_network, build_schedule
from tests.toys import tiny
from tools import import_diffusers
from training.stage import student_stages


def test_the_benchmark_measures_what_it_says(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    output = tmp_path / "x.json"
    arguments = ["--config_path", str(config), "--rounds", "3", "--steps", "2"]
    arguments += ["--beside", "engine.precision=bf16"]
    assert throughput.main([*arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    wholes = ("training update", "distillation update", "sampling, 2 steps")
    besides = {f"{name}, engine.precision=bf16" for name in wholes}
    assert result["ratios"].keys() == throughput.RATIOS.keys() | {f"{b} / without" for b in besides}
    assert besides < result["measures"].keys()
    assert all(ratio["median"] > 0 for ratio in result["ratios"].values())
    gflop = result["gflop_per_image"]
    # a backward pass is two forward passes, and two teacher forwards come on top of that
    assert gflop["training update"] == pytest.approx(3 * gflop["forward"], rel=0.1)
    assert gflop["distillation update"] == pytest.approx(5 * gflop["forward"], rel=0.1)
    layers = gflop["convolutions alone"] + gflop["matrix products alone"]
    assert layers == pytest.approx(gflop["training update"], rel=0.1)  # but for attention itself
    assert all(rate > 0 for rate in result["fastest_gflop_per_second"].values())
    assert "| training update |" in capsys.readouterr().out


def test_what_cannot_be_timed_beside_is_refused(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    given = ["--config_path", str(config), "--output", str(tmp_path / "x.json"), "--beside"]
    for value in ("training.batch_size=4", "engine.tf32=false"):
        assert throughput.main([*given, value]) == 2
        assert f"--beside {value}: take values of engine" in capsys.readouterr().err
    adversarial = "distillation.losses={snr_trunc: 1.0, adversarial: 0.1}"
    assert throughput.main([*given[:2], "--set", adversarial]) == 2
    assert "distillation.losses: adversarial is not timed" in capsys.readouterr().err


def test_what_is_timed_in_float32_is_not_compared_with_less():
    config = load_config(Path("configs/quickstart.yaml"), ["engine.precision=bf16"])
    bench = SimpleNamespace(
        config=config,
        whole_measures=list,
        batch_size=1,
        gflop={name: 1.0 for pair in throughput.RATIOS.values() for name in pair},
        steps=2,
        device=torch.device("cpu"),
        parameters=1,
        fastest={},
    )
    bench.gflop = {name.format("2 steps" if "samp" in name else "2"): 1.0 for name in bench.gflop}
    times = {name: [1.0, 2.0] for name in bench.gflop}
    arguments = SimpleNamespace(beside=[], config_path="x", set=[], rounds=2)
    ratios = throughput.summarise(times, bench, arguments)["ratios"]
    assert ratios.keys() == {title for title in throughput.RATIOS if "bare" in title}


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
    guided = student_stages(load_config(Path("configs/mnist_guided.yaml")))
    assert [cost.calls_of(stage) for stage in guided] == [2, 4, 2, 2, 2, 2]


@pytest.fixture
def few_real_images(monkeypatch):
    """Fewer real images, for speed."""

    def few(config):
        real = real_images(config)
        return RealImages(real.reference[:500], real.floor[:500], None)

    monkeypatch.setattr("evaluation.gallery.real_images", few)


@pytest.fixture
def run_sweep(few_real_images, tmp_path, monkeypatch):
    """A function that runs a sweep of tiny networks: (its values, options) -> the exit code."""
    base = tmp_path / "tiny.yaml"
    base.write_text(yaml.safe_dump(tiny()))
    given = ["--count", "20", "--output", str(tmp_path / "out")]

    def run(name, *options, **values):
        tiny_base = {"base": base, "common": [], "steps": (2,)} if SWEEPS[name].base else {}
        monkeypatch.setitem(sweep.SWEEPS, name, replace(SWEEPS[name], **(tiny_base | values)))
        budget = [] if "--updates" in options else ["--seconds", "1"]
        return sweep.main([name, *given, *budget, *options])

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file with a base model."""
    folder = tmp_path_factory.mktemp("base")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    assert train.main(["--config_path", str(config), "--output", str(folder)]) == 0
    return folder / "diffusion-4.pt"


@pytest.fixture(scope="module")
def teacher(base, tmp_path_factory):
    """A file with a student of four steps; beside it is one of two."""
    folder = tmp_path_factory.mktemp("ladder")
    given = ["--teacher_model_checkpoint", str(base), "--output", str(folder)]
    assert distill.main(given) == 0
    return folder / "student-4.pt"


def cells(table):
    """The titles of the last table that was printed, and its rows as mappings of title to text."""
    lines = table[table.index("| variant |") :].strip().splitlines()
    titles, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return titles, [dict(zip(titles, row, strict=False)) for row in rows]


def test_experiments_train_in_equal_time_and_go_on(run_sweep, tmp_path, monkeypatch, capsys):
    variants = {"small": ["training.batch_size=4"], "large": ["training.batch_size=32"]}
    assert run_sweep("experiments", variants=variants) == 0
    table = capsys.readouterr().out
    titles, rows = cells(table)
    assert {row["variant"] for row in rows} == variants.keys()
    assert "steps" not in titles, "the same in all rows"
    assert "distance to the teacher's samples" not in titles
    assert {row["changes"] for row in rows} == {"batch_size=4", "batch_size=32"}
    plans = [json.loads((tmp_path / f"out/{n}/plan.json").read_text()) for n in variants]
    stages = [plan["stages"][0] for plan in plans]
    assert all(0.5 < stage["updates"] * stage["seconds"] <= 1 for stage in stages)
    monkeypatch.setattr(train, "main", lambda command: 1 / 0)
    assert run_sweep("experiments", variants=variants) == 0, "nothing is trained twice"
    assert table.endswith(capsys.readouterr().out)
    assert run_sweep("experiments", "--count", "30", variants=variants) == 2, "another measure"
    assert "of 1 seconds, 20 samples, [2] steps" in capsys.readouterr().err
    assert run_sweep("experiments", "--only", "middle", variants=variants) == 2
    assert "take small, large" in capsys.readouterr().err


def test_base_models_are_trained_for_equal_updates_if_asked(run_sweep, tmp_path, capsys):
    variants = {"small": ["training.batch_size=4"], "large": ["training.batch_size=8"]}
    given = ("--updates", "3", "--set", "training.warmup=1")
    assert run_sweep("teachers", *given, variants=variants) == 0
    _, rows = cells(capsys.readouterr().out)
    assert [row["updates"] for row in rows] == ["3", "3"]
    assert {row["variant"]: row["images seen"] for row in rows} == {"small": "12", "large": "24"}
    assert load_checkpoint(tmp_path / "out/small/diffusion-3.pt").config.training.warmup == 1
    assert run_sweep("teachers", variants=variants) == 2, "a time instead"
    assert "made for other seconds" in capsys.readouterr().err
    assert run_sweep("methods", "--updates", "3", "--checkpoint", "x.pt") == 2
    assert "--updates: methods has students" in capsys.readouterr().err
    assert run_sweep("teachers", "--checkpoint", "x.pt") == 2
    assert "--checkpoint: teachers trains its base models" in capsys.readouterr().err
    assert run_sweep("networks", "--updates", "3") == 2
    assert "--updates: networks has students" in capsys.readouterr().err


def test_an_ablation_has_every_cell_and_the_best_twice(run_sweep, monkeypatch, capsys):
    variants = {name: [f"diffusion.prediction={name}"] for name in ("x", "v")}
    trained = train.main

    def diverging(command):
        if "diffusion.prediction=x" not in command:
            return trained(command)
        folder = Path(command[command.index("--output") + 1])
        line = {"stage": 0, "update": 9, "skipped": True}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return 2

    monkeypatch.setattr(train, "main", diverging)
    assert run_sweep("ablation", variants=variants, repeated=1) == 0
    table = capsys.readouterr().out
    assert "| x | prediction=x | diverged |" in table
    _, rows = cells(table)
    found = sorted((row["variant"], row["sampler"]) for row in rows if "Frechet distance" in row)
    twice = [(name, sampler) for name in ("v", "v-again") for sampler in ("ancestral", "ddim")]
    assert [row for row in found if row[0] != "x"] == twice
    assert table.count(" ± ") == table.count(" -> ") - 1 == 4, "distances, and losses beside them"


def test_a_stage_is_distilled_by_every_recipe_in_equal_time(
    run_sweep, teacher, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(measures, "HELD_OUT", 200)
    variants = {"rate5": [], "b8": ["distillation.batch_size=8"]}
    given = ["stages", "--checkpoint", str(teacher)]
    capsys.readouterr()
    assert run_sweep(*given, variants=variants) == 0
    _, rows = cells(capsys.readouterr().out)
    rows = [row for row in rows if row["variant"] != "teacher"]
    assert {row["variant"] for row in rows} == variants.keys()
    assert all(float(row["distance to the teacher's samples"]) > 0 for row in rows)
    losses = {row["variant"]: float(row["loss on test images"]) for row in rows}
    seen = {row["variant"]: int(row["images seen"].replace(",", "")) for row in rows}
    calls = {row["variant"]: int(row["network calls"].replace(",", "")) for row in rows}
    assert all(calls[name] == 3 * seen[name] for name in variants), "the student's and two legs'"
    copied = replace(load_checkpoint(tmp_path / "out/b8/student-2.pt"))
    untrained = replace(copied, model=load_checkpoint(teacher).model)
    measurer = measures.Measurer(
        SWEEPS["stages"], teacher, 20, tmp_path / "out", torch.device("cpu")
    )
    assert losses["b8"] < measurer.held_out_loss(untrained), "its teacher's own weights"
    monkeypatch.setattr(distill, "main", lambda command: 1 / 0)
    assert run_sweep(*given, variants=variants) == 0, "nothing is distilled twice"
    given[-1] = str(tmp_path / "copied.pt")  # of other weights than those of the teacher
    save_checkpoint(tmp_path / "copied.pt", replace(copied, grid=load_checkpoint(teacher).grid))
    capsys.readouterr()
    assert run_sweep(*given, variants=variants) == 2
    line = capsys.readouterr().err
    assert "teacher/result.json: of " in line
    assert "--checkpoint" in line
    (tmp_path / "out/teacher/result.json").unlink()
    assert run_sweep(*given, variants=variants) == 2
    assert "plan.json: made for other teacher" in capsys.readouterr().err
    assert run_sweep("stages", variants=variants) == 2
    assert "--checkpoint: missing" in capsys.readouterr().err


def test_methods_are_compared_at_every_step_count(run_sweep, teacher, tmp_path, capsys):
    common = [item for item in SWEEPS["methods"].common if "batch_size" not in item]
    average = ["distillation.ema_decay=0.999"]
    variants = {
        "progressive": ["distillation.ladder=[4,2,1]", "distillation.updates_per_stage=[1,2]"],
        "adaptive": ["distillation.ladder=[4,1]", "distillation.grid=adaptive"],
        "consistency": ["distillation.ladder=[4,1]", "distillation.method=consistency", *average],
    }
    values = {"common": common, "variants": variants, "steps": (2, 1)}
    capsys.readouterr()
    assert run_sweep("methods", "--checkpoint", str(teacher), **values) == 0
    _, (own, *rows) = cells(capsys.readouterr().out)
    assert (own["variant"], own["steps"], own["updates"]) == ("teacher", "4", "0")
    assert float(own["distance to the teacher's samples"]) == 0
    assert {(row["variant"], row["steps"]) for row in rows} == {
        *(("progressive", n) for n in "21"),
        ("adaptive", "1"),
        *(("consistency", n) for n in "21"),
    }
    for row in rows:
        assert float(row["distance to the teacher's samples"]) > 0
        compared = row["less that of progressive"]
        assert ("±" in compared) == (row["variant"] != "progressive")
    of = {(row["variant"], row["steps"]): row for row in rows}

    def calls_of(*key):
        row = of[key]
        values = (row[title].replace(",", "") for title in ("network calls", "images seen"))
        calls, images = map(int, values)
        return calls / images

    assert calls_of("progressive", "2") == calls_of("progressive", "1") == 3
    assert calls_of("adaptive", "1") == 5
    assert calls_of("consistency", "1") == 3
    stages = json.loads((tmp_path / "out/progressive/plan.json").read_text())["stages"]
    assert stages[1]["updates"] == pytest.approx(2 * stages[0]["updates"], abs=1)
    results = {
        path.parent.name: json.loads(path.read_text())["rows"]
        for path in (tmp_path / "out").glob("*/result.json")
    }
    points = {
        name: {point[0] for point in points} for name, points in sweep.curves_of(results).items()
    }
    assert points == {"teacher": {4}, "progressive": {2, 1}, "adaptive": {1}, "consistency": {2, 1}}
    assert sweep.curves_of({"adaptive": results["adaptive"]}) == {}, "one step count is no curve"
    with Image.open(tmp_path / "out/distances.png") as picture:
        assert picture.width > 500


def test_a_base_model_that_teaches_is_measured_in_its_default_steps(run_sweep, tmp_path, capsys):
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny(sampling={"steps": 6, "grid": 9})))
    assert train.main(["--config_path", str(config), "--output", str(run)]) == 0
    common = [item for item in SWEEPS["methods"].common if "batch_size" not in item]
    values = {"common": common, "variants": {"progressive": ["distillation.ladder=[4,2]"]}}
    capsys.readouterr()
    given = ("methods", "--checkpoint", str(run / "diffusion-4.pt"))
    assert run_sweep(*given, **values, steps=(2,)) == 0
    _, rows = cells(capsys.readouterr().out)
    assert [(row["variant"], row["steps"]) for row in rows] == [
        ("teacher", "6"),
        ("progressive", "2"),
    ]
    assert float(rows[0]["distance to the teacher's samples"]) == 0
    assert float(rows[1]["distance to the teacher's samples"]) > 0, "to those of 4 steps"


def test_networks_are_compared_with_their_ladders(run_sweep, capsys):
    dit = "model={name: dit, channels: 8, depth: 1, attention_heads: 2, patch_size: 4}"
    common = [item for item in SWEEPS["methods"].common if "batch_size" not in item]
    students = replace(
        SWEEPS["networks"].students, common=[*common, "distillation.ladder=[4,2,1]"], steps=(2, 1)
    )
    values = {"variants": {"unet": [], "dit": [dit]}, "steps": (4,), "students": students}
    assert run_sweep("networks", **values) == 0
    _, rows = cells(capsys.readouterr().out)
    found = {(row["variant"], row["steps"]): row for row in rows}
    assert found.keys() == {(name, n) for name in ("unet", "dit") for n in "421"}
    for (_, count), row in found.items():
        assert float(row["ms an image"]) > 0
        assert (row["distance to the teacher's samples"] == "") == (count == "4")


def test_a_pipeline_of_diffusers_is_trained_and_imported(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="trains a pipeline of the diffusers library")
    small = {"layers_per_block": 1, "block_out_channels": (8, 8, 8), "norm_num_groups": 8}
    monkeypatch.setattr(diffusers_pipeline, "SIZES", diffusers_pipeline.SIZES | small)
    folder, file = tmp_path / "pipeline", tmp_path / "pipeline.safetensors"
    assert diffusers_pipeline.main(["--output", str(folder), "--seconds", "1"]) == 0
    assert diffusers_pipeline.main(["--output", str(folder), "--seconds", "1"]) == 2, "exists"
    given = [str(folder), "--output", str(file), "--set", "data.name=mnist"]
    assert import_diffusers.main(given) == 0
    imported = load_checkpoint(file)
    assert len(imported.grid) == 1001
    assert imported.config.diffusion.prediction == "eps"


def test_the_error_of_each_step_is_told(few_real_images, base, tmp_path, capsys):
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
    whole = []  # of the student alone, with 1, 2 and 3 images: mean and median
    for count in ("1", "2", "3"):
        assert steps.main([*given, str(ladder / "student-4.pt"), "--count", count]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        whole.append([float(value) for value in last.split("|")[-3:-1]])
    (one, _), (two, _), (three, median) = whole
    assert median == pytest.approx(sorted([one, 2 * two - one, 3 * three - 2 * two])[1], abs=5e-6)
    assert median != three
    assert steps.main([*given, str(ladder / "student-2.pt")]) == 2
    assert "not a student of" in capsys.readouterr().err
    copied = tmp_path / "copied.pt"
    teacher = load_checkpoint(ladder / "student-4.pt")
    for num_steps, code in ((8, 0), (3, 2)):  # its grid has the student's levels, or not
        grid = uniform_grid(build_schedule(teacher.config), num_steps)
        save_checkpoint(copied, replace(teacher, grid=tuple(grid.tolist())))
        assert steps.main([*given, str(copied), "--count", "8"]) == code


def test_the_background_is_measured_along_the_edge(base, capsys, few_real_images):
    capsys.readouterr()
    given = ["--checkpoint", str(base), "--count", "8"]
    assert background.main([*given, "--steps", "4"]) == 0
    rows = [line.replace(" ", "")[1:-1].split("|") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["1.000", "0.750", "0.500", "0.250", "thesample"]
    assert rows[4][1:3] == ["-0.00", "127.5"], "as much noise as image"
    assert float(rows[2][-1]) == pytest.approx(1, abs=0.1), "pure noise, which hides black"
    assert all(float(row[-2]) > 1 for row in rows[2:]), "an untrained network knows no black"
    black = -torch.ones(1, 1, 8, 8)
    assert background.off_black(black) == 0
    black[..., 2:-2, 2:-2] = 1.0
    assert background.off_black(black) == 0, "what is not on the rim does not count"
    black[..., 0, 0] += 2 / 255
    assert background.off_black(black) == pytest.approx((1 / 48) ** 0.5, rel=1e-3)


# --- make gpu -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_that_a_gpu_is_asked_for_runs_on_a_cpu(tmp_path, capsys, monkeypatch, compiled):
    if not compiled:  # the tests of a device are among those that run now
        monkeypatch.setattr(gpu, "COMPILED", ())
        monkeypatch.setattr(gpu, "device_tests", lambda *_: {"passed": 0, "failed": 0})
    assert gpu.main(["--device", "cpu", "--small", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tests"]["failed"] == 0
    assert result["tests"]["passed"] >= (8 if compiled else 0)
    assert result["resume"]["continued"]
    assert result["resume"]["largest_difference"] == 0.0, "on a CPU to the bit"
    assert result["resume"]["moved"] > 0
    assert not result["left_out"]
    assert {row["config"] for row in result["speed"]} == set(gpu.CONFIGS)
    ways = {row["way"] for row in result["speed"]}
    eager = {"tf32", "tf32, recorded", "bf16", "fp32", "fp16", "bf16, channels first"}
    assert ways == (eager | {"bf16, compiled"} if compiled else eager)
    for row in result["speed"]:
        assert min(row[kind] for kind in ("training", "distillation", "sampling")) > 0, row
    assert result["tutorial"]["last_loss"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\n| ") == 1 + len(result["speed"])


def test_what_the_time_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "device_tests", lambda *_: {"passed": 1, "failed": 0})
    resumed = {"largest_difference": 0.0, "continued": True}
    monkeypatch.setattr(gpu, "resume_test", lambda *_: resumed)
    trained = dict.fromkeys(("updates", "seconds", "first_loss", "last_loss"), 1.0)
    monkeypatch.setattr(gpu, "short_training", lambda *_: {**trained, "images_per_second": 1.0})
    monkeypatch.setattr(gpu, "arithmetic", lambda *_: {})
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 100)).__next__)
    assert gpu.main(["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert not result["speed"]
    assert len(result["left_out"]) == len(gpu.CONFIGS) * (len(gpu.EAGER) + len(gpu.COMPILED)) == 24
    assert "Not measured, for lack of time: mnist_small, tf32;" in (tmp_path / "gpu.md").read_text()


def test_the_share_of_a_known_gpus_peak(monkeypatch):
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert gpu.peaks_of(torch.device("cpu"))["bf16"] == 989.0
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA H100 PCIe")
    assert gpu.peaks_of(torch.device("cpu"))["bf16"] == 756.0
    row = {"config": "x", "batch_size": 2, "way": "bf16", "training": 1000.0}
    shown = gpu.table([{**row, "training_utilisation": 0.25}, {**row, "problem": "out of memory"}])
    assert "| 1,000 (25%) |" in shown
    assert "| out of memory |" in shown


# --- latency --------------------------------------------------------------------------------------


def test_a_batch_that_would_take_too_long_is_not_timed(monkeypatch):
    drawn = []
    cpu = torch.device("cpu")
    took = latency.per_image(lambda n: drawn.append(n) or float(n), [1, 16, 64], cpu)
    assert took == [1.0, 1.0, float("inf")]
    assert drawn == [1] * 4 + [16] * 2, "a few times, but not for minutes"
    assert latency.row("x", 8, "browser", took).endswith("| 1,000 | 1,000 |  | 1.0 |")


def test_models_that_are_no_graph_of_ddim_on_pixels_have_no_row_of_onnx(base):
    stored = load_checkpoint(base)
    assert latency.can_be_exported(stored)
    values = {**stored.config.model_dump(mode="json"), "sampling": {"sampler": "ancestral"}}
    assert not latency.can_be_exported(replace(stored, config=make_config(values, "x")))


def test_latencies_are_timed_by_model_way_and_batch(base, teacher, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="one of the ways that are timed")
    monkeypatch.setattr(latency, "BASE_STEPS", (32,))
    monkeypatch.setattr(latency, "LONGEST", 4)
    monkeypatch.setattr("tools.export_onnx.MOST_STEPS", 4)
    pair = map(str, (base, teacher.with_name("student-2.pt")))
    capsys.readouterr()
    command = ["--checkpoint", *pair, "--batch_size", "1", "3", "--device", "cpu"]
    assert latency.main([*command, "--ways", "pytorch", "onnx"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[0][3:5] == ["batch 1", "batch 3"]
    found = [tuple(row[:3]) for row in cells[2:]]
    models = (("diffusion-4", "32"), ("student-2", "2"))
    assert found == [
        (name, steps, way) for name, steps in models for way in ("PyTorch", "ONNX Runtime")
    ]
    assert lines[0].startswith("# "), "standard output is the page's alone"
    times = {
        row: float(line[4].replace(",", "")) for row, line in zip(found, cells[2:], strict=True)
    }
    for way in ("PyTorch", "ONNX Runtime"):
        assert times["diffusion-4", "32", way] > times["student-2", "2", way]
    for line in cells[2:]:
        best = min(float(cell.replace(",", "")) for cell in line[3:5])
        rate = float(line[5].replace(",", ""))
        assert 1000 / (best + 0.06) <= rate + 0.06, "both are printed with one decimal"
        assert best < 0.06 or rate - 0.06 <= 1000 / (best - 0.06)


@pytest.mark.slow
def test_onnx_files_are_compared_with_pytorch(tmp_path, capsys, monkeypatch, few_real_images):
    pytest.importorskip("onnxruntime", reason="runs the files that are compared")
    path = Path("pretrained/mnist-1-step.safetensors").resolve()
    assert onnx_variants.main(["--checkpoint", str(path), "--count", "60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in cells[1:]}
    assert list(rows) == ["PyTorch", *(f"ONNX Runtime, {p}" for p in ("fp32", "fp16", "int8"))]
    sizes = [float(rows[f"ONNX Runtime, {p}"][0]) for p in ("fp32", "fp16", "int8")]
    assert sizes[0] > 1.7 * sizes[1] > 2.5 * sizes[2]
    shares = {name: float(row[3].rstrip("%")) for name, row in rows.items()}
    assert shares["PyTorch"] == 0
    assert shares["ONNX Runtime, fp32"] < 1 < shares["ONNX Runtime, int8"]
    assert float(rows["ONNX Runtime, fp32"][4].rstrip("%")) == 0
    distances = [float(rows[n][2].split()[0]) for n in ("ONNX Runtime, fp32", "PyTorch")]
    assert distances[0] == pytest.approx(distances[1], rel=0.01)
