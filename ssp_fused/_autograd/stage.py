"""The stage, u = sum_k c_k t_k + channel_bias: alone, and what it adds to the Functions that begin with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .. import reference
from .._backends import Backend

Extras = tuple[list[Tensor], list[float], None]


@dataclass(frozen=True)
class Stage:
    """What a stage op is told beside its tensors.

    Attributes:
        coefficients: One a term, or None where a tensor holds them.
        write_u: False only for a single term with coefficient 1, which then stands for u (before its channel bias).
    """

    backend: Backend
    coefficients: tuple[float, ...] | None
    write_u: bool = True

    @property
    def numbers(self) -> list[float]:
        """The coefficients as an op takes them, empty where a tensor holds them."""
        return [] if self.coefficients is None else list(self.coefficients)


@dataclass(frozen=True)
class Norm:
    """What a normalization is told beside its tensors."""

    eps: float
    activation: int
    z_dtype: torch.dtype
    num_groups: int = 0
    process_group: Any = None


def ops_of(backend: Backend) -> Any:
    """The backend's ops, or the reference's where the gradient's own graph is being recorded."""
    return reference if torch.is_grad_enabled() else backend.ops


def gradients_of_stage(
    ctx: FunctionCtx,
    coefficient_tensor: Tensor | None,
    terms: Sequence[Tensor],
    du: Tensor | None,
    first_term: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of learned coefficients and of the terms, from that of u.

    A term with coefficient 1 shares du; every other gets a scaled copy in its own dtype.
    """
    stage: Stage = ctx.stage
    ops = ops_of(stage.backend)
    wanted = ctx.needs_input_grad[first_term:]
    if du is None:
        return None, [None] * len(wanted)
    d_coefficients = None
    if ctx.learned:
        d_coefficients = ops.stage_dots(du, list(terms)).to(coefficient_tensor.dtype)
    d_terms: list[Tensor | None] = []
    for k, (want, dtype) in enumerate(zip(wanted, ctx.term_dtypes, strict=True)):
        if not want:
            d_terms.append(None)
        elif stage.coefficients is None:
            scaled = ops.stage_combine([du], [], coefficient_tensor[k : k + 1], None)
            d_terms.append(scaled.to(dtype))
        elif stage.coefficients[k] == 1:
            d_terms.append(du.to(dtype))
        else:
            d_terms.append(ops.stage_combine([du], [stage.coefficients[k]], None, None).to(dtype))
    return d_coefficients, d_terms


def extras_of(du_later: Tensor | None) -> Extras:
    """The gradient of u that later stages send, as an op of the backward pass adds it."""
    return ([], [], None) if du_later is None else ([du_later], [1.0], None)


def sum_of(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are there."""
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient, where there is one, in the dtype of what it belongs to."""
    return None if gradient is None or like is None else gradient.to(like.dtype)


class StageCombine(Function):
    """u = sum_k c_k t_k + channel_bias."""

    @staticmethod
    def forward(ctx, stage, coefficient_tensor, channel_bias, *terms):
        """u; saves the terms only where coefficients are learned."""
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.term_dtypes = stage, [term.dtype for term in terms]
        ctx.bias_dtype = None if channel_bias is None else channel_bias.dtype
        ctx.learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(coefficient_tensor, *(terms if ctx.learned else ()))
        ops = stage.backend.ops
        return ops.stage_combine(list(terms), stage.numbers, coefficient_tensor, channel_bias)

    @staticmethod
    def backward(ctx, du):
        """Gradients of the coefficients, the channel bias and the terms."""
        coefficient_tensor, *terms = ctx.saved_tensors
        d_coefficients, d_terms = gradients_of_stage(ctx, coefficient_tensor, terms, du, 3)
        d_bias = None
        if du is not None and ctx.needs_input_grad[2]:
            d_bias = ops_of(ctx.stage.backend).channel_sum(du).to(ctx.bias_dtype)
        return None, d_coefficients, d_bias, *d_terms
