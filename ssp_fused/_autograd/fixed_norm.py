"""Batch norm with statistics given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .._layout import statistics_dtype
from .._ops import PIECEWISE_LINEAR
from .stage import cast, extras_of, gradients_of_stage, ops_of, sum_of


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
        ctx.by_mask = frozen and norm.activation in PIECEWISE_LINEAR
        keep_mask = ctx.by_mask and any(ctx.needs_input_grad[8:]) and norm.activation != 0
        shifted = _shifted(mean, None if stage.write_u else channel_bias)
        u, z, mask = stage.backend.ops.stage_norm_act(
            list(terms),
            stage.numbers,
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
        ops = ops_of(stage.backend)
        shifted = _shifted(mean, None if stage.write_u else channel_bias)
        du, sum_dy, sum_dy_xhat = du_later, None, None
        if dz is not None:
            if any(ctx.needs_input_grad[5:8]):
                sum_dy, sum_dy_xhat, _ = ops.norm_act_backward_reduce(
                    dz, 1.0, None, u, shifted, rstd, weight, bias, norm.activation, False
                )
            extras = extras_of(du_later)
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
        d_coefficients, d_terms = gradients_of_stage(ctx, coefficient_tensor, terms, du, 8)
        d_channel_bias = None
        if ctx.needs_input_grad[5]:
            later = None if du_later is None else ops.channel_sum(du_later)
            own = None if sum_dy is None else sum_dy * rstd
            if own is not None and weight is not None:
                own = own * weight.to(own.dtype)
            d_channel_bias = sum_of(later, own)
        return (
            None,
            None,
            None,
            None,
            d_coefficients,
            cast(d_channel_bias, channel_bias),
            cast(sum_dy_xhat, weight) if ctx.needs_input_grad[6] else None,
            cast(sum_dy, bias) if ctx.needs_input_grad[7] else None,
            *d_terms,
        )


def _shifted(mean: Tensor, channel_bias: Tensor | None) -> Tensor:
    """The mean to subtract from a term whose channel bias was not added: (t + b) - mean = t - (mean - b)."""
    return mean if channel_bias is None else mean - channel_bias.to(mean.dtype)


def fixed_statistics(
    running_mean: Tensor, running_var: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copies of the running statistics as mean and rstd, in the statistics dtype of ``dtype``."""
    arithmetic = statistics_dtype(dtype)
    mean = running_mean.detach().to(arithmetic, copy=True)
    return mean, (running_var.detach().to(arithmetic) + eps).rsqrt()
