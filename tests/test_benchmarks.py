import json

import pytest
import yaml

from benchmarks import throughput
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
    import torch

    bench = throughput.Bench.__new__(throughput.Bench)
    bench.batch_size = 1
    a = torch.zeros(10, 10)
    assert bench.gflop_of(lambda: a @ a) == pytest.approx(2 * 10**3 / 1e9)
