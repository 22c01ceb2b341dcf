"""The models of the page: one graph for all, weights in half precision, what PyTorch gives."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from pipeline.build import image_shape, load_denoiser
from pipeline.checkpoint import Checkpoint, load_checkpoint, progressive_student, save_checkpoint
from pipeline.config import make_config
from pipeline.network import build_network
from tests.models.test_unet import awake
from tests.processes import run_alone
from tests.toys import tiny
from tools import export_demo

pytest.importorskip("onnx", reason="exports to ONNX")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs ONNX files")
pytest.importorskip("onnxscript", reason="exports to ONNX")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def network(path, steps=None, seed=0, data=None, **model):
    """A checkpoint with random weights that float16 can hold: a student, or without steps a base.

    Its biases are all equal, as those of trained networks may be.
    """
    values = tiny(data=data or {})
    values["model"] |= model
    config = make_config(values, "x")
    torch.manual_seed(seed)
    weights = awake(build_network(config, CPU)).state_dict()
    weights = {
        name: (torch.ones_like(t) / 8 if name.endswith("bias") else t).half().float()
        for name, t in weights.items()
    }
    if steps is None:
        save_checkpoint(path, Checkpoint("base", "tiny", config, 1, 0, weights))
    else:
        kind = progressive_student(config, steps)
        save_checkpoint(path, Checkpoint("student", "tiny", config, 1, 1, weights, **kind))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoints, and two folders: the second one in another order, and without the guided."""
    folder = tmp_path_factory.mktemp("demo")
    found = {
        "teacher": network(folder / "teacher.pt"),
        "student-4": network(folder / "student.pt", 4, seed=1),
        "guided": network(folder / "guided.pt", 2, seed=2, num_classes=10, guidance=True),
        "one": folder / "one",
        "two": folder / "two",
    }
    plain = [str(found["teacher"]), str(found["student-4"])]
    guided = ["--guided", str(found["guided"])]
    commands = [
        ["--checkpoint", *plain, *guided, "--steps", "6", "--output", str(found["one"])],
        ["--checkpoint", *plain[::-1], "--steps", "6", "--output", str(found["two"])],
    ]
    assert "written: " in run_alone("tools.export_demo", *commands)
    return found


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_files_depend_on_the_weights_alone(files):
    """Not on the order, and the graph not even on them, though all biases are equal."""
    one, two = ({p.name: p.read_bytes() for p in files[n].iterdir()} for n in ("one", "two"))
    manifests = [json.loads(found.pop("manifest.json")) for found in (one, two)]
    guided = manifests[0].pop("guided")
    assert manifests[0] == manifests[1]
    assert {name: one[name] for name in two} == two
    assert guided["graph"]["file"] not in two
    assert set(one) == {
        *("graph.onnx", "guided.onnx"),
        *("teacher.bin.gz", "student-4.bin.gz", "guided.bin.gz"),
    }
    assert one["teacher.bin.gz"] != one["student-4.bin.gz"]


def test_the_manifest_describes_the_files(files):
    folder, manifest = files["one"], read(files["one"])
    guided = manifest["guided"]
    entries = [manifest["graph"], guided["graph"], guided["weights"]]
    entries += [model["weights"] for model in manifest["models"]]
    for entry in entries:
        content = (folder / entry.get("packed", entry["file"])).read_bytes()
        if "packed" in entry:
            assert entry["packedBytes"] == len(content)
            content = gzip.decompress(content)
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [(m["name"], m["steps"]) for m in manifest["models"]] == [
        ("teacher", 6),
        ("student-4", 4),
    ]
    for model in (*manifest["models"], guided):
        checkpoint = load_checkpoint(files[model["name"]])
        levels = checkpoint.levels(model["steps"]).tolist()
        assert model["levels"] == levels[:-1]
        assert levels[-1] == float("inf")
        assert model["clip"] is checkpoint.config.sampling.clip
        numbers = sum(t.numel() for t in checkpoint.weights.values())
        assert model["weights"]["bytes"] == 2 * numbers
    assert (guided["classes"], guided["steps"]) == (10, 2)
    assert guided["guidance"][0] < guided["guidance"][1]


@pytest.mark.parametrize("name", ["teacher", "student-4", "guided"])
def test_graph_and_weights_are_the_denoiser(files, name, tmp_path):
    graph = "guided.onnx" if name == "guided" else "graph.onnx"
    (tmp_path / graph).write_bytes((files["one"] / graph).read_bytes())
    (tmp_path / "weights").write_bytes(
        gzip.decompress((files["one"] / f"{name}.bin.gz").read_bytes())
    )
    session = onnxruntime.InferenceSession(tmp_path / graph, providers=["CPUExecutionProvider"])
    checkpoint = load_checkpoint(files[name])
    denoise = load_denoiser(checkpoint, files[name], CPU)
    z = torch.randn(33, *image_shape(checkpoint.config))
    logsnr = torch.linspace(-20, 20, 33)
    named = {}
    if name == "guided":
        named = {"label": torch.arange(33) % 11 - 1, "guidance": torch.linspace(0, 4, 33)}
    expected = denoise(z, logsnr, **named)
    given = {k: t.numpy() for k, t in {"z": z, "logsnr": logsnr, **named}.items()}
    for ours, theirs in zip(session.run(["x_hat", "eps_hat"], given), expected, strict=True):
        difference = (torch.from_numpy(ours) - theirs).abs().max()
        assert difference <= 1e-4 * max(1.0, theirs.abs().max().item())


def test_what_the_page_cannot_draw_is_refused_in_one_line(files, tmp_path, capsys):
    teacher, student = str(files["teacher"]), str(files["student-4"])
    wide = str(network(tmp_path / "wide.pt", 2, channels=16))
    # Networks with attention at 8 x 8, which images of both sizes have.
    eight = str(network(tmp_path / "eight.pt", attention_resolutions=[8]))
    at_64 = {"data": {"image_size": 64}, "attention_resolutions": [8]}
    large = str(network(tmp_path / "large.pt", 2, **at_64))
    colour = str(network(tmp_path / "colour.pt", data={"channels": 3}))
    guided = str(network(tmp_path / "guided.pt", 2, **at_64, num_classes=10, guidance=True))
    output = tmp_path / "models"
    for arguments, reason in (
        (["--checkpoint", teacher, wide], "wide.pt: model is not that of"),
        (["--checkpoint", eight, large], "large.pt: data.image_size is not that of"),
        (["--checkpoint", colour], "data.channels: 3; the page draws grey"),
        (["--checkpoint", teacher, student, student], "student.pt: a second student-4"),
        (["--checkpoint", str(files["guided"])], "give this one as --guided"),
        (["--checkpoint", teacher, "--guided", student], "not a student that takes a class"),
        (["--checkpoint", teacher, "--guided", guided], "data.image_size: 64, not that"),
        (["--checkpoint", str(tmp_path / "missing.pt")], "missing.pt"),
        (["--checkpoint", teacher, "--steps", "0"], "--steps"),
    ):
        assert export_demo.main([*arguments, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert not output.exists()
