"""Who computes a step through a chain of SSP blocks: fused layers, plain PyTorch in several ways, and two floors."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from ssp_fused import schemes
from ssp_fused.nn import SSPBlock, SSPStack

from . import judge
from .cases import CHANNELS_LAST, CONTIGUOUS, DTYPES, Case
from .harness import CannotRunError, Contender, Work
from .judge import Judge, Results
from .memory import Kept, kept_for_backward
from .packages import apex_stack, inplace_abn_stack
from .plain import RecordedSigns, plain_stack
from .results import CONTROL, CONVOLUTIONS, COPY, EAGER

BACKENDS = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # and the device that each serves
_COMPILE_MODES = {
    "compile-default": None,
    "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
}
_PACKAGES = {"apex": apex_stack, "inplace_abn": inplace_abn_stack}
_NORM_ACTS = ("stage_norm_act", "stage_batch_norm_act", "stage_group_norm_act")
NAMES = (
    EAGER,
    CONTROL,
    "eager-channels-last",
    *(f"fused-{backend}" for backend in BACKENDS),
    *_COMPILE_MODES,
    *_PACKAGES,
    CONVOLUTIONS,
    COPY,
)


def contenders(
    case: Case, names: Sequence[str] = NAMES, *, compiling: bool = True
) -> list[Contender]:
    """The contenders of a case by name.

    Args:
        case: What they compute.
        names: Of :data:`NAMES`.
        compiling: Whether torch.compile may run, which takes its time.

    Raises:
        ValueError: An unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown contender {', '.join(unknown)}; known: {', '.join(NAMES)}")
    if compiling and not _COMPILE_MODES.keys().isdisjoint(names):
        torch._dynamo.reset()  # what other cases compiled counts towards a limit, past which it runs eagerly
    rule = Judge(case)
    return [Contender(name, partial(_build, name, case, rule, compiling)) for name in names]


def _build(name: str, case: Case, rule: Judge, compiling: bool) -> Work:
    if name == COPY:
        return copy_of(case.logical_bytes(), case.device)
    if name == CONVOLUTIONS:
        return _convolutions(case)
    if name.startswith("fused-"):
        return _fused(name, case, rule)
    if name in _PACKAGES:
        return _package(name, case, rule)
    layout = case.layout
    if name in (EAGER, CONTROL):
        layout = CONTIGUOUS
    elif name == "eager-channels-last":
        layout = CHANNELS_LAST
    network = placed(plain_stack(case.shape[1], case.scheme, case.blocks), case, layout)
    if name not in _COMPILE_MODES:
        return network_work(name, case, rule, network, network, layout, RecordedSigns)
    mode = _COMPILE_MODES[name]
    if not compiling:
        raise CannotRunError("torch.compile was left out")
    if mode is not None and case.device.type != "cuda":
        raise CannotRunError(f"mode {mode!r} needs a cuda device, got {case.device}")
    compiled = torch.compile(network, mode=mode, fullgraph=True, dynamic=False)
    around = nullcontext if mode is None else _next_cudagraph_step
    work = network_work(name, case, rule, network, compiled, layout, around=around)
    return dataclasses.replace(work, capturable=mode is None)  # else it has graphs of its own


@contextmanager
def _next_cudagraph_step() -> Iterator[None]:
    """Lets torch.compile's own CUDA graphs reuse the memory of the last step's results."""
    torch.compiler.cudagraph_mark_step_begin()
    yield


def placed(network: nn.Module, case: Case, layout: str) -> nn.Module:
    """The network as the case has it: device, dtype, values, modes, and weights in the layout of its activations."""
    network = network.to(case.device, DTYPES[case.dtype])
    if layout == CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    return case.prepare(network, case.state(0))


def network_work(
    name: str,
    case: Case,
    rule: Judge,
    network: nn.Module,
    call: Callable[[Tensor], Tensor],
    layout: str,
    recorder: Callable[[nn.Module], AbstractContextManager[Any]] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Work:
    """The work of a network.

    Args:
        name: The contender's, for messages.
        case: What it computes.
        rule: Of the case.
        network: Holds parameters and buffers.
        call: Its forward pass: itself, or itself compiled.
        layout: Of its activations.
        recorder: Makes a context manager that collects ``signs`` of the activations, where that is possible.
        around: Context of every forward pass.
    """
    wanted = [p for p in network.parameters() if p.requires_grad]

    def forward(x: Tensor) -> Tensor:
        with around():
            return call(x)

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = forward(x)
        return (y, *torch.autograd.grad(y, [x, *wanted], dy))

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return case.inputs(seed, DTYPES[case.dtype], layout)

    def results(seed: int, away_from_kinks: bool) -> Results:
        case.prepare(network, case.state(seed, away_from_kinks=away_from_kinks))
        with recorder(network) if recorder else nullcontext() as recorded:
            found = judge.named_results(network, run(*inputs(seed)))
        if recorded is not None and len(recorded.signs) == case.activations:
            found[judge.SIGNS] = recorded.signs
        return found

    def check() -> str:
        how = rule.check(name, results)
        case.prepare(network, case.state(0))
        return how

    def kept() -> Kept:
        x, _ = inputs(0)
        return kept_for_backward(lambda: forward(x), network.state_dict().values(), [x])

    return Work(run, inputs, check, kept)


class _FusedSigns(TorchDispatchMode):
    """Collects z > 0 of every fused norm and activation, whichever backend's it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.signs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        namespace, op = func.name().removesuffix(".out").split("::")
        if namespace.startswith("ssp_fused") and op in _NORM_ACTS:
            self.signs.append((kwargs["z"] if "z" in kwargs else out[1]) > 0)
        return out


def _fused(name: str, case: Case, rule: Judge) -> Work:
    backend = name.removeprefix("fused-")
    require(backend, case.device)
    stack = SSPStack(*(SSPBlock(case.shape[1], case.scheme) for _ in range(case.blocks)))
    network = placed(stack, case, case.layout)
    around = partial(ssp_fused.use_backend, backend)
    return network_work(name, case, rule, network, network, case.layout, _FusedSigns, around)


def require(backend: str, device: torch.device) -> None:
    """Find out that a backend cannot serve tensors on the device.

    Raises:
        CannotRunError: It cannot; the message says why.
    """
    reason = ssp_fused.available_backends()[backend]
    if reason is not None:
        raise CannotRunError(reason)
    if BACKENDS[backend] != device.type:
        raise CannotRunError(f"it serves {BACKENDS[backend]} tensors, got {device}")


def _package(name: str, case: Case, rule: Judge) -> Work:
    if importlib.util.find_spec(name) is None:
        raise CannotRunError(f"the package {name} is not installed")
    if case.device.type != "cuda":
        raise CannotRunError(f"{name} needs a cuda device, got {case.device}")
    stack = _PACKAGES[name](case.shape[1], case.scheme, case.blocks)
    network = placed(stack, case, case.layout)
    return network_work(name, case, rule, network, network, case.layout)


def _convolutions(case: Case) -> Work:
    """The chain's convolutions, forward and backward, without biases, on inputs that are there already."""
    network = placed(plain_stack(case.shape[1], case.scheme, case.blocks), case, case.layout)
    stages = schemes.get(case.scheme).stages
    weights = [
        conv.weight.detach()
        for block in network
        for conv in (block.conv1, block.conv2)
        for _ in range(stages)
    ]
    wanted = (True, case.training, False)

    def run(z: Tensor, g: Tensor) -> None:
        for weight in weights:
            torch.conv2d(z, weight, padding=1)
        for weight in weights:
            torch.ops.aten.convolution_backward(
                g, z, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
            )

    return Work(run, _detached_inputs(case))


def copy_of(size: int, device: torch.device) -> Work:
    """A copy within the device that reads and writes ``size`` bytes, half of them each.

    In a CUDA graph, copies of many bytes reach but two thirds of their bandwidth.
    """

    def inputs(_: int) -> tuple[Tensor, Tensor]:
        source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
        return source, target

    return Work(lambda source, target: target.copy_(source), inputs, capturable=False)


def _detached_inputs(case: Case) -> Callable[[int], tuple[Tensor, ...]]:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        return tuple(v.detach() for v in case.inputs(seed, DTYPES[case.dtype], case.layout))

    return inputs
