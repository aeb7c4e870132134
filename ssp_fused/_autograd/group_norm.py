"""Group norm."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .. import reference
from .stage import cast, extras_of, gradients_of_stage, ops_of, sum_of


class StageGroupNormAct(Function):
    """u, and z = act(group_norm(u))."""

    @staticmethod
    def forward(ctx, stage, norm, coefficient_tensor, channel_bias, weight, bias, *terms):
        """u (None if not wanted) and z."""
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.norm, ctx.term_dtypes = stage, norm, [term.dtype for term in terms]
        u, z, mean, rstd = stage.backend.ops.stage_group_norm_act(
            list(terms),
            stage.numbers,
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
        ops = ops_of(stage.backend)
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
            extras = extras_of(du_later)
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
        d_coefficients, d_terms = gradients_of_stage(ctx, coefficient_tensor, terms, du, 6)
        d_channel_bias = None
        if ctx.needs_input_grad[3]:
            later = None if du_later is None else ops.channel_sum(du_later)
            d_channel_bias = sum_of(later, own)
        return (
            None,
            None,
            d_coefficients,
            cast(d_channel_bias, channel_bias),
            cast(d_weight, weight) if ctx.needs_input_grad[4] else None,
            cast(d_bias, bias) if ctx.needs_input_grad[5] else None,
            *d_terms,
        )
