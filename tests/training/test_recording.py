"""Recorded work, with a stand-in for CUDA's graphs; tests/test_devices.py has the real ones."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from pipeline.build import build_denoiser
from pipeline.config import make_config
from pipeline.sections import EngineConfig
from tests.toys import tiny
from tests.training.test_loop import ALONE, base_objective, begin, digits, make_stage
from training.loop import train_updates
from training.recording import WARM_UP, Recording
from training.trainee import make_trainee
from utils.processes import World


class Repeated:
    """Stands for a graph: a replay does the work again, from the memory and into the memory."""

    def replay(self):
        for old, new in zip(self.returned, self.work(*self.given), strict=True):
            old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Wraps work, so that a graph in recording knows it; counts calls; all graphs."""
    graphs, recording, calls = [], [], {"eager": 0}

    @contextmanager
    def capture(graph):
        graphs.append(graph)
        recording.append(graph)
        yield
        recording.clear()

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Repeated)

    def wrap(work):
        def watched(*given):
            calls["eager"] += 1
            returned = work(*given)
            for graph in recording:
                graph.work, graph.given, graph.returned = work, given, returned
            return returned

        return watched

    return wrap, calls, graphs


def squares(layer):
    def work(images, condition):
        losses = (layer(images["x"]) * condition["weight"][:, None]).square().sum(1)
        losses.sum().backward()
        return losses.detach(), images["x"] + 1.0

    return work


def test_recorded_work_is_that_of_python_for_any_values_and_shapes(recorded):
    """Of two parts of a batch, of different sizes, whose gradients add up; and update by update."""
    wrap, calls, graphs = recorded
    plain, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(plain.state_dict())
    work, recording = squares(plain), Recording(wrap(squares(other)), list(other.parameters()))
    for _ in range(3):
        plain.zero_grad()
        other.zero_grad(set_to_none=False)
        for size in (2, 3):
            given = {"x": torch.randn(size, 3)}, {"weight": torch.rand(size)}
            for one, two in zip(work(*given), recording(*given), strict=True):
                torch.testing.assert_close(one, two)
        for one, two in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
    assert len(graphs) == 2, "one for each shape"
    assert calls["eager"] == 2 * (WARM_UP + 1)


def test_what_was_returned_stays_as_it_was(recorded):
    layer = nn.Linear(3, 2)
    recording = Recording(recorded[0](squares(layer)), list(layer.parameters()))
    first = recording({"x": torch.zeros(2, 3)}, {"weight": torch.ones(2)})
    kept = [value.clone() for value in first]
    recording({"x": torch.ones(2, 3)}, {"weight": torch.ones(2)})
    for value, before in zip(first, kept, strict=True):
        torch.testing.assert_close(value, before, rtol=0, atol=0)


def test_the_loop_learns_the_same_from_recorded_updates(recorded, monkeypatch):
    """Three updates of nine images, in parts of four and five, from the same weights."""
    wrap, _, graphs = recorded
    monkeypatch.setattr("training.loop.Recording", lambda work, of: Recording(wrap(work), of))
    config, stage = make_config(tiny(model={"dropout": 0.0}), "x"), make_stage(updates=3)
    stage = replace(stage, batch_size=9, accumulate=2)
    ends = []
    for is_recorded in (False, True):
        trainee = begin(config)
        trainee.recorded = is_recorded
        objective = base_objective(build_denoiser(config, trainee.called, ALONE.device))
        metrics = list(train_updates(trainee, stage, digits(), objective, ALONE))
        curve = torch.tensor([(one.loss, one.gradient_norm) for one in metrics])
        ends.append([curve, *trainee.network.parameters()])
    assert len(graphs) == 2
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("device", "processes", "asked", "wanted"),
    [
        ("cuda", 1, True, True),
        ("cuda", 1, False, False),
        ("cuda", 2, True, False),
        ("cpu", 1, True, False),
    ],
)
def test_updates_are_recorded_on_one_gpu_if_asked_for(
    device, processes, asked, wanted, monkeypatch
):
    monkeypatch.setattr(World, "wrap", lambda self, network: network)
    world = World(torch.device(device), 0, processes)
    trainee = make_trainee(nn.Linear(3, 2), make_stage(), world, EngineConfig(cuda_graphs=asked))
    assert trainee.recorded == wanted
