"""``convert``: swap a model's SSP and pre-activation residual blocks for fused ones that share their parameters.

A block is recognized by its class's or its attributes' names, and believed only after a trial: a copy of it and its
fused twin must agree on random input, in training and evaluation mode, buffers and input gradients included.
"""

from __future__ import annotations

from torch import nn

from .._log import LOG
from ..nn import SSPStack
from ..nn.pre_activation import PreActivation
from .blocks import (
    Converted,
    ConvertedAdaptiveSSPBlock,
    ConvertedDownsample,
    ConvertedSSPBlock,
)
from .candidates import candidates
from .plan import Plan
from .trial import first_that_agrees

# The blocks' classes too: pickles of converted models may name them here.
__all__ = [
    "Converted",
    "ConvertedAdaptiveSSPBlock",
    "ConvertedDownsample",
    "ConvertedSSPBlock",
    "Plan",
    "convert",
]


def convert(model: nn.Module) -> nn.Module:
    """Swap every known residual block of a model for a fused one that shares its parameters and buffers.

    Known are the classes of the published SSP networks (ResBlock, with and without ``downsample``, RKBlock2,
    SSPBlock2, SSPBlock3, ArkBlock; B. Kim et al., ECCV 2020, github matbambbang/sspnet), and any residual block
    x + conv2(act(norm2(conv1(act(norm1(x)))))), or with a shortcut module in place of x, whose norms are called
    ``n1, n2``, ``norm1, norm2``, ``bn1, bn2`` or ``gn1, gn2`` and its convolutions ``conv1, conv2``. Norms may be
    BatchNorm2d, SyncBatchNorm or GroupNorm; activations ReLU, leaky ReLU (0.01), SiLU or none.

    Names are not believed: a block is swapped when its fused twin agrees with it on random input, in fp64. The others
    that look like a residual block are listed in the log ("ssp_fused", level WARNING), with the reason.

    Args:
        model: changed in place, except that a model that is itself a residual block is replaced by the result. An
            ``nn.Sequential`` that holds nothing but fused blocks becomes an :class:`~ssp_fused.nn.SSPStack`.

    Returns:
        The model. Parameters, buffers and hooks are the same objects, an optimizer made before goes on working, and
        ``state_dict`` keeps its keys.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}
    refused: dict[nn.Module, tuple[str, str]] = {}
    converted = _walk(model, "", swapped, refused)
    for module, (name, reason) in refused.items():
        place = f"{name} ({type(module).__name__})" if name else type(module).__name__
        LOG.warning("not converted: %s: %s", place, reason)
    if not swapped and not refused:
        LOG.warning("nothing to convert: no residual block in a %s", type(model).__name__)
    return converted


def _walk(
    module: nn.Module,
    name: str,
    swapped: dict[nn.Module, nn.Module],
    refused: dict[nn.Module, tuple[str, str]],
) -> nn.Module:
    """The module's replacement (itself, where there is none), its children replaced in place."""
    if module in swapped:
        return swapped[module]
    if isinstance(module, PreActivation) or module in refused:
        return module
    plans = list(candidates(module))
    if plans:
        block = first_that_agrees(module, plans)
        if isinstance(block, nn.Module):
            swapped[module] = block
            return block
        refused[module] = (name, block)
    for child_name, child in module._modules.items():
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            module._modules[child_name] = _walk(child, path, swapped, refused)
    return _as_stack(module, swapped)


def _as_stack(module: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    blocks = module._modules.values()
    if type(module) is not nn.Sequential or not blocks or "forward" in vars(module):
        return module
    if not all(isinstance(block, Converted) for block in blocks):
        return module
    stack = SSPStack()
    vars(stack).update(vars(module))
    swapped[module] = stack
    return stack
