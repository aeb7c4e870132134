"""The trial: does a fused block compute what the module computes?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _fusion
from .._backends import use_backend
from .blocks import Converted, fused_block
from .candidates import ACTIVATIONS
from .plan import Plan, at

# What a class may bring of its own: everything else of nn.Module would be lost.
_OVERRIDABLE = {
    "__init__",
    "forward",
    "extra_repr",
    "__repr__",
    "__annotate__",
    "__annotate_func__",
}
_CLOSE = 1e-9  # of fp64 results that differ in the order of summation only


def first_that_agrees(module: nn.Module, plans: list[Plan]) -> nn.Module | str:
    """The fused block of the first plan that computes what the module computes, or why there is none."""
    reason = _unsuitable(module, plans[0])
    if reason is not None:
        return reason
    channels = at(module, plans[0].conv1).in_channels
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            expected = _results(_specimen(module), type(module).forward, channels)
            for plan in plans:
                if all(
                    _agree(_results(fused_block(_specimen(module), plan), run, channels), expected)
                    for run in (_fused_by_reference, Converted._plain)
                ):
                    return fused_block(module, plan)
    except Exception as error:  # whatever a stranger's module raises
        text = " ".join(str(error).split())
        return f"it could not be tried on random input ({type(error).__name__}: {text})"
    return (
        "on random input it computes neither x + conv2(act(norm2(conv1(act(norm1(x)))))) nor another known block, "
        f"act being one of {', '.join(ACTIVATIONS)}"
    )


def _unsuitable(module: nn.Module, plan: Plan) -> str | None:
    """What is wrong with the module before it is tried."""
    kind = type(module)
    overridden = {
        name
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if callable(value) and name in vars(nn.Module) and name not in _OVERRIDABLE
    }
    if overridden:
        return f"its class overrides {', '.join(sorted(overridden))} of nn.Module"
    if "forward" in vars(module):
        return "its forward was replaced"
    for name in ("norm1", "norm2"):
        norm = at(module, getattr(plan, name))
        if not isinstance(norm, _fusion.NORMS):
            return f"its {name} is a {type(norm).__name__}, none of {_names(_fusion.NORMS)}"
    for name in ("conv1", "conv2"):
        conv = at(module, getattr(plan, name))
        if not isinstance(conv, nn.Conv2d):
            return f"its {name} is a {type(conv).__name__}, not a Conv2d"
    return None


def _names(types: Iterable[type]) -> str:
    return ", ".join(t.__name__ for t in types)


def _specimen(module: nn.Module) -> nn.Module:
    """A copy on the CPU in fp64, its parameters and statistics such that none hides an operation; without hooks.

    Synchronized norms are plain ones there: a trial is nothing that other processes take part in.
    """
    attributes = [value for part in module.modules() for value in vars(part).values()]
    # What cannot be copied: process groups, and tensors that a forward pass has left behind.
    as_they_are = {
        id(value): value
        for value in attributes
        if (isinstance(value, Tensor) and not value.is_leaf)
        or (dist.is_available() and isinstance(value, dist.ProcessGroup))
    }
    specimen = copy.deepcopy(module, as_they_are).to(device="cpu", dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=torch.float64)

    with torch.no_grad():
        for parameter in specimen.parameters():
            if parameter.dim() > 1:
                parameter.copy_(normal(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(1 + 0.5 * normal(parameter))
        for buffer in specimen.buffers():
            if buffer.is_floating_point():
                buffer.copy_(normal(buffer).abs() + 0.5)
    for part in specimen.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.__class__ = nn.BatchNorm2d
        for hooks in _fusion.HOOKS:
            getattr(part, hooks).clear()
    return specimen


def _fused_by_reference(block: Converted, x: Tensor) -> Tensor:
    with use_backend("reference"):
        return block._fused(x)


def _results(
    block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], channels: int
) -> list[Tensor]:
    """Output and input gradient in both modes, and the buffers afterwards."""
    random = torch.Generator().manual_seed(1)
    results = []
    for training in (True, False):
        x = torch.randn((2, channels, 7, 5), generator=random, dtype=torch.float64).requires_grad_()
        y = run(block.train(training), x.clone())  # a leaf could not be activated in place
        weights = torch.randn(y.shape, generator=random, dtype=torch.float64)
        results += [y.detach(), torch.autograd.grad((weights * y).sum(), x)[0]]
    return results + [buffer.double() for buffer in block.buffers()]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)
        for a, b in zip(found, expected, strict=True)
    )
