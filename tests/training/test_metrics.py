import json
import os

import pytest

from evaluation.curves import draw_loss_curve
from training.metrics import MetricsLog, read_metrics
from utils.command import InputError

GOOD = {"stage": 0, "update": 1, "loss": 0.5}


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({**GOOD, "loss": "a text"}),
        json.dumps({**GOOD, "loss": True}),
        json.dumps({**GOOD, "loss": [1.0]}),
        json.dumps({**GOOD, "loss": 10**400}),
        '{"stage": 0, "update": 1, "loss": NaN}',
        '{"stage": 0, "update": 1, "loss": 1e999}',
        json.dumps({**GOOD, "update": 10**40}),
        json.dumps({**GOOD, "update": True}),
        json.dumps({**GOOD, "stage": -1}),
        json.dumps({**GOOD, "num_steps": [4]}),
        "[" * 100_000,
        "9" * 10_000,
        "null",
        '{"stage": 0',
    ],
    ids=lambda line: line[:60],
)
def test_a_line_that_is_no_metrics_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    null = {"stage": 1, "update": 2, "loss": None, "num_steps": 4}
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(null)}\n")
    assert read_metrics(path) == [GOOD, null]
    draw_loss_curve(tmp_path)
    assert (tmp_path / "loss.png").exists()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "loss.png").unlink()
    draw_loss_curve(tmp_path)
    assert not (tmp_path / "loss.png").exists(), "as in a copied folder of students alone"


def test_metrics_are_read_from_files_alone(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_error_of_the_block_is_not_hidden_by_one_at_its_end(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    def log_that_ends_badly(error):
        with MetricsLog(tmp_path, 0, 0) as log:
            monkeypatch.setattr(log.board, "close", full)
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        log_that_ends_badly(KeyError())
    with pytest.raises(OSError, match=r"No space left on device: '.*tensorboard'"):
        log_that_ends_badly(None)
