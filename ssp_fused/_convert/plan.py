"""How a module is run as a fused block, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..schemes import ShuOsher

Path = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How a module is run as a fused block.

    Attributes:
        norm1, conv1, norm2, conv2: where the branch's submodules are, as names from the module downwards.
        activation: a name of the ops' activations.
        scheme: the step, None for SSP-adap and for blocks with a shortcut module.
        scale: where the module is whose ``coef`` multiplies F; None where F is taken as it is.
        shortcut: where the shortcut module is, None for the identity.
        shortcut_of_input: whether the shortcut sees x, not act(norm1(x)).
        norm1_updates: how often the module evaluates norm1 on its input, for blocks with a shortcut.
        same: where norm1 is found once more: the module that the shortcut goes through.
        uncalled: submodules that the fused block does not call, and which must therefore be without hooks.
    """

    norm1: Path
    conv1: Path
    norm2: Path
    conv2: Path
    activation: str = "relu"
    scheme: ShuOsher | None = None
    scale: Path | None = None
    shortcut: Path | None = None
    shortcut_of_input: bool = False
    norm1_updates: int = 1
    same: Path | None = None
    uncalled: tuple[Path, ...] = ()


def at(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at the end of the path."""
    for name in path:
        module = module._modules[name]
    return module
