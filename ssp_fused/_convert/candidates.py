"""What a residual block may compute, to judge by the names of its class and of its attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from .. import schemes
from .plan import Path, Plan

# Attributes of a residual block, as the field names them; the first of a row that a module has is the one meant.
_NORM_NAMES = (("n1", "n2"), ("norm1", "norm2"), ("bn1", "bn2"), ("gn1", "gn2"))
_SHORTCUT_NAMES = ("downsample", "shortcut", "conv_shortcut", "convShortcut", "skip", "projection")
ACTIVATIONS = ("relu", "leaky_relu", "silu", "identity")  # the likelier first
# The steps of the published classes that hold a residual block as `block`.
_OUTER = {"SSPBlock2": "ssp22", "SSPBlock3": "ssp33"}


def candidates(module: nn.Module) -> Iterator[Plan]:
    """What the names of the class and of the attributes suggest, the likelier first."""
    kind = type(module).__name__
    children = module._modules
    if kind in _OUTER and type(children.get("block")).__name__ == "ResBlock":
        inner = _named_branch(children["block"], ("block",), "residual")
        if inner is not None:
            uncalled = (("block",), *inner.uncalled)
            yield replace(
                inner, scheme=schemes.get(_OUTER[kind]), scale=("block",), uncalled=uncalled
            )
        return
    if kind == "ArkBlock":
        plan = _named_branch(module, (), "f")
        if plan is not None and {"a21", "b10"} <= set(module._parameters):
            yield plan
        return
    if kind in ("ResBlock", "RKBlock2"):
        plan = _named_branch(module, (), "residual")
        if plan is not None and kind == "RKBlock2":
            yield replace(plan, scheme=schemes.get("sspnet-midrk2"))
            return
        if plan is not None and children.get("downsample") is None:
            yield replace(plan, scheme=schemes.get("euler"), scale=())
            return
        if plan is not None:
            yield replace(plan, scale=(), shortcut=("downsample",), norm1_updates=2, same=("n1",))
            return
    yield from _plain_candidates(module)


def _named_branch(module: nn.Module, prefix: Path, branch: str) -> Plan | None:
    """The published layout: n1, relu, conv1, n2, conv2, called through a Sequential (`branch`) of the same modules."""
    sequence = module._modules.get(branch)
    names = ("n1", "relu", "conv1", "n2", "relu", "conv2")
    if not isinstance(sequence, nn.Sequential) or len(sequence) != len(names):
        return None
    if any(module._modules.get(name) is None for name in names):
        return None
    inside = [(*prefix, branch, str(index)) for index in range(len(names))]
    uncalled = ((*prefix, branch), (*prefix, "relu"), inside[1], inside[4])
    return Plan(inside[0], inside[2], inside[3], inside[5], uncalled=uncalled)


def _plain_candidates(module: nn.Module) -> Iterator[Plan]:
    """Pre-activation blocks of anyone's: every activation, shortcut and count of norm1's evaluations that may be."""
    children = module._modules

    def has(*names: str) -> bool:
        return all(children.get(name) is not None for name in names)

    norms = next((pair for pair in _NORM_NAMES if has(*pair)), None)
    if norms is None or not has("conv1", "conv2"):
        return
    shortcut = next((name for name in _SHORTCUT_NAMES if _is_something(children.get(name))), None)
    called = {*norms, "conv1", "conv2", shortcut}
    plan = Plan(
        (norms[0],),
        ("conv1",),
        (norms[1],),
        ("conv2",),
        uncalled=tuple((name,) for name in children if name not in called and has(name)),
    )
    for activation in ACTIVATIONS:
        with_act = replace(plan, activation=activation)
        if shortcut is None:
            yield replace(with_act, scheme=schemes.get("euler"))
            continue
        for of_input in (False, True):
            for updates in (1,) if of_input else (1, 2):
                yield replace(
                    with_act,
                    shortcut=(shortcut,),
                    shortcut_of_input=of_input,
                    norm1_updates=updates,
                )


def _is_something(module: nn.Module | None) -> bool:
    """Whether it is more than the identity."""
    if module is None or isinstance(module, nn.Identity):
        return False
    return not (isinstance(module, nn.Sequential) and len(module) == 0)
