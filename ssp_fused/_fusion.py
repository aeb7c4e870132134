"""Submodules of a block: fused where they are what the block built, called as the modules they are where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from . import functional
from ._backends import select
from ._backends.reference import BACKEND as _REFERENCE
from ._checks import activation_index
from ._distributed import process_group
from ._log import warn_once
from ._ops import MAX_TERMS
from .reference import torch_activation

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)


def runs_plain(x: Tensor) -> bool:
    """Whether the backend chosen for layers on ``x`` is plain PyTorch."""
    return select(functional.BLOCK_OPS, (x,)) is _REFERENCE


def _fusable(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether calling the fused op is the same as calling the module.

    Parametrized weights are fine: they are read through the attribute.
    """
    kind = parametrize.type_before_parametrizations(module)
    if kind not in types:
        reason = f"it is none of {', '.join(t.__name__ for t in types)}"
    else:
        reason = additions(module)
    if reason is not None:
        warn_once(f"a {kind.__name__} in a block is called as it is, unfused: {reason}")
    return reason is None


def additions(module: nn.Module) -> str | None:
    """What a call of the module would do beyond its class's ``forward``."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if any(getattr(module, hooks) for hooks in HOOKS) or _has_any_global_hook():
        return "it has hooks"
    return None


def chainable(norms: Sequence[nn.Module], convs: Sequence[nn.Module]) -> bool:
    """Whether a block of these modules can be part of a chain (``_chain``): all fusable, zeros for padding.

    A parametrized weight may change with every call of its module; a chain reads each once.
    """
    return (
        all(_fusable(norm, *NORMS) for norm in norms)
        and all(_fusable(conv, nn.Conv2d) for conv in convs)
        and all(conv.padding_mode == "zeros" for conv in convs)
        and not any(isinstance(conv.padding, str) for conv in convs)
        and not any(parametrize.is_parametrized(module) for module in (*norms, *convs))
    )


def shortcut_parts(module: nn.Module) -> list[nn.Module] | None:
    """The convolution and the norm of a shortcut, None where it is anything else."""
    parts = list(module) if isinstance(module, nn.Sequential) else []
    return parts if len(parts) == 2 and _fusable(module, nn.Sequential) else None


def convolve(conv: nn.Module, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """``conv(z)`` without its bias, and the bias to be added by the next op (None if there is none left to add)."""
    if not _fusable(conv, nn.Conv2d):
        return conv(z), None
    return conv._conv_forward(z, conv.weight, None), conv.bias


def shortcut(module: nn.Module, z: Tensor) -> Tensor:
    """``module(z)``, where a convolution and a norm in a row are fused."""
    parts = shortcut_parts(module)
    if parts is None:
        return module(z)
    conv, norm = parts
    inner, bias = convolve(conv, z)
    _, out = norm_act(norm, "identity", [inner], channel_bias=bias)
    return out


def combine(
    terms: Sequence[Tensor],
    coefficients: functional.Coefficients,
    channel_bias: Tensor | None = None,
) -> Tensor:
    """``functional.stage_combine`` for any number of terms."""
    terms, coefficients = _at_most(MAX_TERMS, terms, coefficients)
    return functional.stage_combine(terms, coefficients, channel_bias=channel_bias)


def _at_most(
    limit: int, terms: Sequence[Tensor], coefficients: functional.Coefficients
) -> tuple[Sequence[Tensor], functional.Coefficients]:
    """The leading terms of a long tableau row summed up beforehand."""
    while len(terms) > limit:
        partial = functional.stage_combine(terms[:limit], coefficients[:limit])
        terms, coefficients = [partial, *terms[limit:]], [1.0, *coefficients[limit:]]
    return terms, coefficients


def norm_act(
    norm: nn.Module,
    activation: str,
    terms: Sequence[Tensor],
    coefficients: functional.Coefficients | None = None,
    channel_bias: Tensor | None = None,
    *,
    updates: int = 1,
) -> tuple[Tensor, Tensor]:
    """The stage u and ``act(norm(u))``.

    Without coefficients the single term is the stage itself, and is returned as it is; a channel bias is then seen
    by the normalization alone.

    Args:
        norm: The normalization module.
        activation: The activation's name.
        terms: The stage's operands.
        coefficients: One a term, or None.
        channel_bias: ``[C]``, added to the stage.
        updates: How often the running statistics take this batch in.
    """
    write_u = coefficients is not None
    if coefficients is None:
        coefficients = (1.0,)
    if not _fusable(norm, *NORMS):
        plain = not write_u and channel_bias is None
        u = terms[0] if plain else combine(terms, coefficients, channel_bias)
        for _ in range(updates):
            y = norm(u)
        return u if write_u else terms[0], torch_activation(y, activation_index(activation))
    terms, coefficients = _at_most(MAX_TERMS, terms, coefficients)
    stage: dict[str, Any] = {
        "channel_bias": channel_bias,
        "eps": norm.eps,
        "activation": activation,
        "write_u": write_u,
    }
    if isinstance(norm, nn.GroupNorm):
        u, z = functional.group_norm_act(
            terms, coefficients, norm.num_groups, norm.weight, norm.bias, **stage
        )
    else:
        tracked = norm.running_mean is not None
        training = norm.training or not tracked
        moving = norm.training and norm.track_running_stats
        u, z = functional.batch_norm_act(
            terms,
            coefficients,
            norm.weight,
            norm.bias,
            norm.running_mean if moving or not training else None,
            norm.running_var if moving or not training else None,
            training=training,
            momentum=norm.momentum,
            process_group=process_group(norm),
            num_batches_tracked=norm.num_batches_tracked if moving else None,
            updates=updates,
            **stage,
        )
    return (u if write_u else terms[0]), z
