"""The autograd Functions: what each saves, and its backward in terms of the ops.

Forward and backward run the same backend. Where a gradient is itself to be differentiated (``create_graph=True``),
backward is computed by the reference's formulas instead, which autograd records; saved inputs and outputs carry
their history, so nothing else is needed. No buffer is touched there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import _distributed, reference
from ._backends import Backend
from ._layout import statistics_dtype
from ._ops import ACTIVATIONS

_MASKABLE = tuple(ACTIVATIONS.index(name) for name in ("identity", "relu", "leaky_relu"))
_NO_EXTRAS: tuple[list[Tensor], list[float], None] = ([], [], None)


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


@dataclass(frozen=True)
class Norm:
    """What a normalization is told beside its tensors."""

    eps: float
    activation: int
    z_dtype: torch.dtype
    num_groups: int = 0
    process_group: Any = None


def _ops(backend: Backend) -> Any:
    """The backend's ops, or the reference's where the gradient's own graph is being recorded."""
    return reference if torch.is_grad_enabled() else backend.ops


def _numbers(stage: Stage) -> list[float]:
    return [] if stage.coefficients is None else list(stage.coefficients)


def _gradients_of_stage(
    ctx: FunctionCtx,
    stage: Stage,
    coefficient_tensor: Tensor | None,
    terms: Sequence[Tensor],
    du: Tensor | None,
    first_term: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of learned coefficients and of the terms, from that of u.

    A term with coefficient 1 shares du; every other gets a scaled copy in its own dtype.
    """
    ops = _ops(stage.backend)
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
        return ops.stage_combine(list(terms), _numbers(stage), coefficient_tensor, channel_bias)

    @staticmethod
    def backward(ctx, du):
        """Gradients of the coefficients, the channel bias and the terms."""
        coefficient_tensor, *terms = ctx.saved_tensors
        d_coefficients, d_terms = _gradients_of_stage(
            ctx, ctx.stage, coefficient_tensor, terms, du, 3
        )
        d_bias = None
        if du is not None and ctx.needs_input_grad[2]:
            d_bias = _ops(ctx.stage.backend).channel_sum(du).to(ctx.bias_dtype)
        return None, d_coefficients, d_bias, *d_terms


def _sum_of(*parts: Tensor | None) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


class StageBatchNormAct(Function):
    """u, and z = act(batch_norm(u)) with the statistics of the batch, of this process or of a group of them."""

    @staticmethod
    def forward(ctx, stage, norm, coefficient_tensor, channel_bias, weight, bias, *terms):
        """u (None if not wanted), z, mean, biased variance, count; the last three not differentiable.

        Without u written, a channel bias is left out: it shifts the mean and nothing else.
        """
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.norm, ctx.term_dtypes = stage, norm, [term.dtype for term in terms]
        ops = stage.backend.ops
        operands = (
            list(terms),
            _numbers(stage),
            coefficient_tensor,
            channel_bias if stage.write_u else None,
        )
        count = None
        if norm.process_group is None:
            u, z, mean, variance, rstd = ops.stage_batch_norm_act(
                *operands, weight, bias, norm.eps, norm.activation, norm.z_dtype, stage.write_u
            )
        else:
            u, mean, variance = ops.stage_moments(*operands, stage.write_u)
            rows = terms[0].numel() // terms[0].shape[1]
            mean, variance, count = _distributed.merge_moments(
                mean, variance, rows, norm.process_group
            )
            rstd = (variance + norm.eps).rsqrt()
            if stage.write_u:
                operands = ([u], [1.0], None, None)
            _, z, _ = ops.stage_norm_act(
                *operands,
                mean,
                rstd,
                weight,
                bias,
                norm.activation,
                norm.z_dtype,
                False,
                False,
            )
        ctx.learned = ctx.needs_input_grad[2]
        ctx.save_for_backward(
            u if stage.write_u else terms[0],
            mean,
            rstd,
            weight,
            bias,
            channel_bias,
            count,
            coefficient_tensor,
            *(terms if ctx.learned else ()),
        )
        ctx.mark_non_differentiable(mean, variance)
        if count is not None:
            ctx.mark_non_differentiable(count)
        return u if stage.write_u else None, z, mean, variance, count

    @staticmethod
    def backward(ctx, du_later, dz, *_):
        """Gradients of the coefficients, the channel bias, weight, bias and the terms."""
        u, mean, rstd, weight, bias, channel_bias, count, coefficient_tensor, *terms = (
            ctx.saved_tensors
        )
        stage, norm = ctx.stage, ctx.norm
        ops = _ops(stage.backend)
        du, sum_dy, sum_dy_xhat = du_later, None, None
        if dz is not None:
            if torch.is_grad_enabled():
                _refuse_synchronized(norm)
                mean, _, rstd = _differentiable_moments(u, norm)
            extras = _NO_EXTRAS if du_later is None else ([du_later], [1.0], None)
            operands = (u, mean, rstd, weight, bias, norm.activation)
            if norm.process_group is None:
                du, sum_dy, sum_dy_xhat, _ = ops.batch_norm_act_backward(
                    dz, 1.0, None, *operands, *extras, False
                )
            else:
                sum_dy, sum_dy_xhat, _ = ops.norm_act_backward_reduce(
                    dz, 1.0, None, *operands, False
                )
                sums = _distributed.all_reduce_sums(sum_dy, sum_dy_xhat, norm.process_group)
                du = ops.norm_act_backward(
                    dz, 1.0, None, u, None, *operands[1:], *sums, 1.0, count, *extras, None
                )
        d_coefficients, d_terms = _gradients_of_stage(ctx, stage, coefficient_tensor, terms, du, 6)
        d_channel_bias = None
        if ctx.needs_input_grad[3]:
            # The batch's mean follows the bias: only a later stage sees it.
            later = None if du_later is None else ops.channel_sum(du_later)
            d_channel_bias = torch.zeros_like(channel_bias) if later is None else later
        return (
            None,
            None,
            d_coefficients,
            _cast(d_channel_bias, channel_bias),
            _cast(sum_dy_xhat, weight) if ctx.needs_input_grad[4] else None,
            _cast(sum_dy, bias) if ctx.needs_input_grad[5] else None,
            *d_terms,
        )


def _refuse_synchronized(norm: Norm) -> None:
    if norm.process_group is not None:
        raise RuntimeError(
            "create_graph=True is not supported for batch statistics synchronized over processes"
        )


def _differentiable_moments(u: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    _, mean, variance = reference.stage_moments([u], [1.0], None, None, False)
    return mean, variance, (variance + norm.eps).rsqrt()


class StageFixedNormAct(Function):
    """u, and z = act(batch_norm(u)) with statistics given.

    Where nothing but u can require a gradient and the activation is piecewise linear, one bit an element is kept.
    """

    @staticmethod
    def forward(
        ctx, stage, norm, mean, rstd, coefficient_tensor, channel_bias, weight, bias, *terms
    ):
        """u (None if not wanted) and z."""
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.norm, ctx.term_dtypes = stage, norm, [term.dtype for term in terms]
        ctx.learned = ctx.needs_input_grad[4]
        frozen = not any(ctx.needs_input_grad[4:8])
        ctx.by_mask = frozen and norm.activation in _MASKABLE
        keep_mask = ctx.by_mask and any(ctx.needs_input_grad[8:]) and norm.activation != 0
        shifted = _shifted(mean, None if stage.write_u else channel_bias)
        u, z, mask = stage.backend.ops.stage_norm_act(
            list(terms),
            _numbers(stage),
            coefficient_tensor,
            channel_bias if stage.write_u else None,
            shifted,
            rstd,
            weight,
            bias,
            norm.activation,
            norm.z_dtype,
            stage.write_u,
            keep_mask,
        )
        ctx.u_dtype = u.dtype if stage.write_u else terms[0].dtype
        saved = u if stage.write_u else terms[0]
        ctx.save_for_backward(
            None if ctx.by_mask else saved,
            mask if keep_mask else None,
            mean,
            rstd,
            weight,
            bias,
            channel_bias,
            coefficient_tensor,
            *(terms if ctx.learned else ()),
        )
        return u if stage.write_u else None, z

    @staticmethod
    def backward(ctx, du_later, dz):
        """Gradients of the coefficients, the channel bias, weight, bias and the terms."""
        u, mask, mean, rstd, weight, bias, channel_bias, coefficient_tensor, *terms = (
            ctx.saved_tensors
        )
        stage, norm = ctx.stage, ctx.norm
        ops = _ops(stage.backend)
        shifted = _shifted(mean, None if stage.write_u else channel_bias)
        du, sum_dy, sum_dy_xhat = du_later, None, None
        if dz is not None:
            if any(ctx.needs_input_grad[5:8]):
                sum_dy, sum_dy_xhat, _ = ops.norm_act_backward_reduce(
                    dz, 1.0, None, u, shifted, rstd, weight, bias, norm.activation, False
                )
            extras = _NO_EXTRAS if du_later is None else ([du_later], [1.0], None)
            if any(ctx.needs_input_grad[8:]) or ctx.needs_input_grad[4]:
                du = ops.norm_act_backward(
                    dz,
                    1.0,
                    None,
                    u,
                    mask,
                    None if ctx.by_mask else shifted,
                    rstd,
                    weight,
                    bias,
                    norm.activation,
                    None,
                    None,
                    1.0,
                    None,
                    *extras,
                    ctx.u_dtype,
                )
        d_coefficients, d_terms = _gradients_of_stage(ctx, stage, coefficient_tensor, terms, du, 8)
        d_channel_bias = None
        if ctx.needs_input_grad[5]:
            later = None if du_later is None else ops.channel_sum(du_later)
            own = None if sum_dy is None else sum_dy * rstd
            if own is not None and weight is not None:
                own = own * weight.to(own.dtype)
            d_channel_bias = _sum_of(later, own)
        return (
            None,
            None,
            None,
            None,
            d_coefficients,
            _cast(d_channel_bias, channel_bias),
            _cast(sum_dy_xhat, weight) if ctx.needs_input_grad[6] else None,
            _cast(sum_dy, bias) if ctx.needs_input_grad[7] else None,
            *d_terms,
        )


def _shifted(mean: Tensor, channel_bias: Tensor | None) -> Tensor:
    """The mean to subtract from a term whose channel bias was not added: (t + b) - mean = t - (mean - b)."""
    return mean if channel_bias is None else mean - channel_bias.to(mean.dtype)


class StageGroupNormAct(Function):
    """u, and z = act(group_norm(u))."""

    @staticmethod
    def forward(ctx, stage, norm, coefficient_tensor, channel_bias, weight, bias, *terms):
        """u (None if not wanted) and z."""
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.norm, ctx.term_dtypes = stage, norm, [term.dtype for term in terms]
        u, z, mean, rstd = stage.backend.ops.stage_group_norm_act(
            list(terms),
            _numbers(stage),
            coefficient_tensor,
            channel_bias,
            norm.num_groups,
            weight,
            bias,
            norm.eps,
            norm.activation,
            norm.z_dtype,
            stage.write_u,
        )
        ctx.learned = ctx.needs_input_grad[2]
        ctx.save_for_backward(
            u if stage.write_u else terms[0],
            mean,
            rstd,
            weight,
            bias,
            channel_bias,
            coefficient_tensor,
            *(terms if ctx.learned else ()),
        )
        return u if stage.write_u else None, z

    @staticmethod
    def backward(ctx, du_later, dz):
        """Gradients of the coefficients, the channel bias, weight, bias and the terms."""
        u, mean, rstd, weight, bias, channel_bias, coefficient_tensor, *terms = ctx.saved_tensors
        stage, norm = ctx.stage, ctx.norm
        ops = _ops(stage.backend)
        unadded = None if stage.write_u else channel_bias
        du, d_weight, d_bias, own = du_later, None, None, None
        if dz is not None:
            if torch.is_grad_enabled():
                _, _, mean, rstd = reference.stage_group_norm_act(
                    [u],
                    [1.0],
                    None,
                    unadded,
                    norm.num_groups,
                    None,
                    None,
                    norm.eps,
                    norm.activation,
                    None,
                    False,
                )
            extras = _NO_EXTRAS if du_later is None else ([du_later], [1.0], None)
            du, d_weight, d_bias, own, _ = ops.group_norm_act_backward(
                dz,
                1.0,
                None,
                u,
                unadded,
                mean,
                rstd,
                weight,
                bias,
                norm.activation,
                *extras,
                False,
            )
        d_coefficients, d_terms = _gradients_of_stage(ctx, stage, coefficient_tensor, terms, du, 6)
        d_channel_bias = None
        if ctx.needs_input_grad[3]:
            later = None if du_later is None else ops.channel_sum(du_later)
            d_channel_bias = _sum_of(later, own)
        return (
            None,
            None,
            d_coefficients,
            _cast(d_channel_bias, channel_bias),
            _cast(d_weight, weight) if ctx.needs_input_grad[4] else None,
            _cast(d_bias, bias) if ctx.needs_input_grad[5] else None,
            *d_terms,
        )


def fixed_statistics(
    running_mean: Tensor, running_var: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copies of the running statistics as mean and rstd, in the statistics dtype of ``dtype``."""
    arithmetic = statistics_dtype(dtype)
    mean = running_mean.detach().to(arithmetic, copy=True)
    return mean, (running_var.detach().to(arithmetic) + eps).rsqrt()
