"""CUDA graphs: what a GPU does in an update is recorded once, and then repeated as a whole.

A small network's kernels take less time than Python needs to launch them one by one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.objectives import Tensors

Work = Callable[..., tuple[Tensor, ...]]
"""Groups of named tensors -> tensors; adds to the gradients of parameters."""
WARM_UP = 3  # calls in which libraries choose their kernels and take their memory


class Recorded(NamedTuple):
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    given: tuple[Tensors, ...]
    returned: tuple[Tensor, ...]


class Recording:
    """Does the work by a graph of its kernels, recorded anew for other shapes of tensors.

    The work must not look at a value on the CPU, and what else it reads must stay where it is in
    memory. parameters: those to whose gradients it adds; they must not be set to None afterwards.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter]) -> None:
        self.work, self.parameters = work, parameters
        self.graphs: dict[tuple[object, ...], Recorded] = {}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, *groups: Tensors) -> tuple[Tensor, ...]:
        """Returns what the work does."""
        named = [(n, *item) for n, group in enumerate(groups) for item in group.items()]
        key = tuple((n, name, value.shape, value.dtype) for n, name, value in named)
        if key not in self.graphs:
            self.graphs[key] = self._record(groups)
        graph, given, returned = self.graphs[key]
        for n, name, value in named:
            given[n][name].copy_(value)
        graph.replay()
        return tuple(value.clone() for value in returned)

    def _record(self, groups: Sequence[Tensors]) -> Recorded:
        """Records the work, and leaves the gradients as they are."""
        given = tuple({name: value.clone() for name, value in group.items()} for group in groups)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        before = [gradient.clone() for gradient in gradients]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.work(*given)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = self.work(*given)
        torch._foreach_copy_(gradients, before)
        return Recorded(graph, given, returned)
