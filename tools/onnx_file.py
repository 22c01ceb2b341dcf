"""ONNX files of this project: their graphs, their metadata, and reading them back."""

import copy
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.gaussian import Denoiser, clipped, conditioned, ddim_step
from pipeline.checkpoint import Checkpoint, digest
from pipeline.codec import decode
from utils.command import InputError
from utils.files import require_regular_file

FORMAT = "progressive-distillation onnx"
FORMAT_VERSION = 1
OPSET = 18
LARGEST = 2**31  # bytes of a file


class OneStep(nn.Module):
    """(z, logsnr, *condition) -> x_hat, eps_hat, as the network is trained (diffusion.clip).

    conditions: names of the inputs.
    """

    def __init__(self, denoiser: Denoiser, conditions: list[str]) -> None:
        super().__init__()
        self.denoiser, self.conditions = denoiser, conditions
        self.network: Any = denoiser.network

    def forward(self, z: Tensor, logsnr: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_hat and eps_hat."""
        named = dict(zip(self.conditions, condition, strict=True))
        prediction = self.denoiser(z, logsnr, **named)
        return prediction.x, prediction.eps


class Jump(nn.Module):
    """(z, here, there, *condition) -> z at the level there: one DDIM step. here, there: (1,)."""

    def __init__(self, denoiser: Denoiser, conditions: list[str], clip: bool) -> None:
        super().__init__()
        self.denoiser, self.conditions, self.clip = denoiser, conditions, clip
        self.network: Any = denoiser.network

    def forward(self, z: Tensor, here: Tensor, there: Tensor, *condition: Tensor) -> Tensor:
        """Returns where the step leads to."""
        denoise = conditioned(self.denoiser, **dict(zip(self.conditions, condition, strict=True)))
        denoise = clipped(denoise) if self.clip else denoise
        here, there = (level.expand(z.shape[0]) for level in (here, there))
        return ddim_step(denoise(z, here), there)


class Decode(nn.Module):
    """x -> uint8 images."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the images."""
        return decode(x)


def one_step(
    denoiser: Denoiser, conditions: list[str], shape: tuple[int, ...], optimize: bool = True
) -> Any:
    """Returns the onnx model of a OneStep. shape: (C, H, W). optimize: see traced."""
    names = ["z", "logsnr", *conditions]
    inputs = (torch.randn(2, *shape), torch.zeros(2))
    step = OneStep(denoiser, conditions)
    return traced(step, inputs, _examples(conditions), names, ["x_hat", "eps_hat"], optimize)


def all_steps(
    denoiser: Denoiser, conditions: list[str], shape: tuple[int, ...], clip: bool, levels: Tensor
) -> Any:
    """Returns the onnx model of sampling: noise, *conditions -> uint8 images, on these levels."""
    z = torch.randn(2, *shape)
    jump = Jump(denoiser, conditions, clip)
    inputs = (z, torch.zeros(1), torch.ones(1))
    names = ["z", "here", "there", *conditions]
    once = traced(jump, inputs, _examples(conditions), names, ["z_there"])
    return unrolled(once, traced(Decode(), (z,), (), ["x"], ["images"]), levels)


def _examples(conditions: list[str]) -> tuple[Tensor, ...]:
    """Returns the conditions of two images."""
    given = {"label": torch.tensor([0, -1]), "guidance": torch.tensor([0.0, 1.0])}
    return tuple(given[name] for name in conditions)


def traced(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    condition: tuple[Tensor, ...],
    names: list[str],
    outputs: list[str],
    optimize: bool = True,
) -> Any:
    """Returns the module as an onnx model of a batch of any size.

    inputs, condition: examples of two images; those of one number are of levels for all images.
    optimize: False keeps each weight of the module as it is, under its own name.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        needed = "onnx onnxscript onnxruntime"
        raise InputError(f"--output: ONNX needs packages: pip install {needed}") from None
    batch = torch.export.Dim("batch", min=1, max=2**16)
    shapes: list[Any] = [{0: batch} if len(value) == 2 else {} for value in inputs]
    if condition:  # *condition is one argument
        shapes.append(tuple({0: batch} for _ in condition))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (*inputs, *condition),
            input_names=names,
            output_names=outputs,
            dynamic_shapes=tuple(shapes),
            opset_version=OPSET,
            dynamo=True,
            optimize=optimize,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # where in the source it came from
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del model.graph.value_info[:]
    return model


def unrolled(jump: Any, end: Any, levels: Tensor) -> Any:
    """Returns the onnx model of all steps: copies of jump, with one set of weights, and end.

    jump: the model of a Jump, whose inputs are z, here, there and the conditions; end: of Decode.
    levels: the grid.
    """
    from onnx import helper, numpy_helper

    graph = jump.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    z, here, there, *conditions = list(graph.input)
    shared = {name: name for name in (*weights, *(value.name for value in conditions), "")}
    nodes, latest = [], "noise"

    def add(part: Any, prefix: str, given: dict[str, str]) -> str:
        """Adds a copy of the part's nodes. given: what its inputs are called here."""
        for original in part.node:
            node = copy.deepcopy(original)
            nodes.append(node)
            node.name = f"{prefix}{node.name}"
            for names in (node.input, node.output):
                renamed = [given.get(n, f"{prefix}{n}") for n in names]
                del names[:]
                names.extend(renamed)
        return f"{prefix}{part.output[0].name}"

    for n, pair in enumerate(pairwise(levels.float())):
        given = {**shared, z.name: latest}
        for value, level in zip((here, there), pair, strict=True):
            name = f"level {n} {value.name}"
            weights[name] = numpy_helper.from_array(level[None].numpy(), name)
            given[value.name] = name
        latest = add(graph, f"step {n} ", given)
    for tensor in end.graph.initializer:  # its names may be those of other weights
        weights[f"end {tensor.name}"] = own = copy.deepcopy(tensor)
        own.name = f"end {tensor.name}"
    images = add(end.graph, "end ", {"": "", end.graph.input[0].name: latest})
    noise, made = copy.deepcopy(z), copy.deepcopy(end.graph.output[0])
    noise.name, made.name = "noise", images
    whole = helper.make_graph(
        nodes, "sampler", [noise, *conditions], [made], list(weights.values())
    )
    return helper.make_model(
        whole, opset_imports=jump.opset_import, ir_version=jump.ir_version, functions=jump.functions
    )


def conditions_of(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the inputs beside image and noise level."""
    model = checkpoint.config.model
    named = {"label": model.num_classes is not None, "guidance": model.guidance}
    return [name for name, wanted in named.items() if wanted]


def metadata(checkpoint: Checkpoint, graph: str, levels: Tensor, precision: str) -> dict[str, str]:
    """Returns what a file says of itself, as texts. levels: all but the last one, +inf."""
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graph": graph,
        "precision": precision,
        "name": checkpoint.name,
        "grid": levels[:-1].tolist(),
        "config": checkpoint.config.model_dump(mode="json"),
        "weights": digest(checkpoint.weights),
    }
    return {key: json.dumps(value) for key, value in values.items()}


def halve(model: Any, where: Path, smallest: int = 256) -> None:
    """Stores the weights of an onnx model in float16; the graph casts them back to float32.

    smallest: tensors with fewer numbers stay as they are. where: the checkpoint's file. Raises
    InputError for a number that is too large for float16.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < smallest:
            continue
        name = tensor.name
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise InputError(f"{where}: {name}: too large for float16; only float32 holds it")
        half = numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
        casts.append(helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


class OnnxModel(NamedTuple):
    """A file of this project, to be run. about: its metadata."""

    session: Any
    about: dict[str, Any]

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Returns the outputs for these inputs, by name."""
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(output) for output in self.session.run(None, given)]


def read_onnx(path: Path, threads: int = 1) -> OnnxModel:
    """Opens a file with onnxruntime. Raises InputError if it is damaged or not of this project."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("onnxruntime: not installed; pip install onnx onnxruntime") from None
    try:
        require_regular_file(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    if size > LARGEST:
        raise InputError(f"{path}: {size:,} bytes; at most {LARGEST:,} are read")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of its own kinds, which share no base class
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"{path}: not a readable ONNX model ({reason})") from None
    texts = session.get_modelmeta().custom_metadata_map
    try:
        about = {key: json.loads(text) for key, text in texts.items()}
    except ValueError:
        about = {}
    if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{path}: not written by tools/export_onnx.py, so its inputs are unknown")
    return OnnxModel(session, about)
