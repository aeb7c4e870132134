"""Attacks captured in CUDA graphs: replayed as long as nothing has changed, else captured anew."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import _backends
from .._fusion import HOOKS

Function = Callable[..., Tensor]
# Runs before the capture, which must find every workspace allocated and every kernel chosen.
_WARMUP = 2


class Captured(Protocol):
    """A captured function."""

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """Its result for these inputs, in memory of its own."""


class CapturedGraph:
    """A function captured in a CUDA graph, with the memory that it reads and writes.

    The model's buffers and torch's random state are what they were before: what the runs before
    the capture did to them is undone. Keeps neither the function nor the model alive.

    Args:
        model: whose parameters and buffers the function reads; on the device of the inputs.
        function: from tensors to a tensor; must not synchronize with the host.
        inputs: an example of its arguments.

    Raises:
        ValueError: the inputs are not on a CUDA device.
    """

    def __init__(self, model: nn.Module, function: Function, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        if device.type != "cuda":
            raise ValueError(f"graph must go with images on a cuda device, got {device}")
        self._inputs = [tensor.clone() for tensor in inputs]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.random.fork_rng(devices=[device]), torch.cuda.stream(aside):
            for _ in range(_WARMUP):
                function(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """Copy the inputs in, run, copy the result out; nothing waits for the device."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()


class GraphCache:
    """Captured functions of models; one that fits is replayed, for others there is a new capture.

    A capture fits as long as these are what they were: the caller's key; shapes, strides, dtypes
    and devices of the inputs; the model's modules with their types, settings (`extra_repr`), modes
    and hooks; addresses, shapes, strides and dtypes of its parameters and buffers, whose values
    may change; autocast; the implementation of the layers (`use_backend`); torch's settings of
    numerics. What a model keeps elsewhere (a tensor or a number as a plain attribute that
    `extra_repr` does not show) is not seen: call `clear` after changing that.

    Args:
        capture: makes a `Captured` of (model, function, inputs); must not keep the model alive.
        size: captures kept per model, each with the memory of all steps; the one used least
            recently goes.
    """

    def __init__(
        self,
        capture: Callable[[nn.Module, Function, Sequence[Tensor]], Captured] = CapturedGraph,
        size: int = 4,
    ) -> None:
        self._capture = capture
        self._size = size
        self._entries: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Captured]]
        self._entries = weakref.WeakKeyDictionary()

    def run(
        self,
        model: nn.Module,
        function: Function,
        inputs: Sequence[Tensor],
        *,
        key: Hashable,
    ) -> Tensor:
        """`function(*inputs)`, replayed.

        Args:
            model: whose parameters and buffers the function reads.
            function: called with the inputs where a capture is needed.
            inputs: its arguments.
            key: tells functions apart that differ in anything else than inputs and model.
        """
        captures = self._entries.setdefault(model, OrderedDict())
        full = (key, *map(_layout, inputs), _model_key(model), _settings(inputs[0].device))
        if full not in captures:
            while len(captures) >= self._size:
                captures.popitem(last=False)
            captures[full] = self._capture(model, function, inputs)
        captures.move_to_end(full)
        return captures[full].replay(inputs)

    def clear(self) -> None:
        """Drop all captures, and give their memory back."""
        self._entries.clear()


CACHE = GraphCache()


def clear_graphs() -> None:
    """Drop every captured attack: the next one with graph=True is captured anew."""
    CACHE.clear()


def _layout(tensor: Tensor) -> Hashable:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _model_key(model: nn.Module) -> Hashable:
    modules = tuple(
        (
            name,
            type(module),
            module.extra_repr(),
            module.training,
            *(tuple(getattr(module, hooks)) for hooks in HOOKS),  # by ids that are given out once
        )
        for name, module in model.named_modules()
    )
    tensors = chain(model.parameters(), model.buffers())
    return modules, tuple((tensor.data_ptr(), _layout(tensor)) for tensor in tensors)


def _settings(device: torch.device) -> Hashable:
    """What decides which kernels run, besides their arguments."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        _backends.current(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
