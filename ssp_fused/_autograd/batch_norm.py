"""Batch norm with the statistics of the batch."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .. import _distributed, reference
from .stage import cast, extras_of, gradients_of_stage, ops_of


class StageBatchNormAct(Function):
    """u, and z = act(batch_norm(u)) with the statistics of the batch, of this process or of a group of them."""

    @staticmethod
    def forward(ctx, stage, norm, coefficient_tensor, channel_bias, weight, bias, *terms):
        """u (None if not wanted), z, mean, biased variance, count; the last three not differentiable.

        Without u written, a channel bias is left out: it shifts the mean and nothing else.
        """
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.norm, ctx.term_dtypes = stage, norm, [term.dtype for term in terms]
        bias_of_u = channel_bias if stage.write_u else None
        u, z, mean, variance, rstd, count = _distributed.stage_batch_norm_act(
            stage.backend.ops,
            (list(terms), stage.numbers, coefficient_tensor, bias_of_u),
            (weight, bias),
            norm.eps,
            norm.activation,
            norm.z_dtype,
            stage.write_u,
            norm.process_group,
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
        ops = ops_of(stage.backend)
        du, sum_dy, sum_dy_xhat = du_later, None, None
        if dz is not None:
            if torch.is_grad_enabled():
                _distributed.refuse_second_derivatives([norm.process_group])
                _, mean, variance = reference.stage_moments([u], [1.0], None, None, False)
                rstd = (variance + norm.eps).rsqrt()
            du, sum_dy, sum_dy_xhat, _ = _distributed.batch_norm_act_backward(
                ops,
                (dz, 1.0, None),
                (u, mean, rstd, weight, bias, norm.activation),
                extras_of(du_later),
                False,
                norm.process_group,
                count,
            )
        d_coefficients, d_terms = gradients_of_stage(ctx, coefficient_tensor, terms, du, 6)
        d_channel_bias = None
        if ctx.needs_input_grad[3]:
            # The batch's mean follows the bias: only a later stage sees it.
            later = None if du_later is None else ops.channel_sum(du_later)
            d_channel_bias = torch.zeros_like(channel_bias) if later is None else later
        return (
            None,
            None,
            d_coefficients,
            cast(d_channel_bias, channel_bias),
            cast(sum_dy_xhat, weight) if ctx.needs_input_grad[4] else None,
            cast(sum_dy, bias) if ctx.needs_input_grad[5] else None,
            *d_terms,
        )
