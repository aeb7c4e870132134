"""Gradients of a chain that can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _distributed, reference
from .plan import BATCH, FIXED, Block, Conv, Norm, Plan
from .records import get


def differentiable(
    plan: Plan, x: Tensor, t: Sequence[Tensor], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd's own, through the chain in plain PyTorch."""
    _distributed.refuse_second_derivatives(
        norm.process_group for block in plan.blocks for norm in block.norms()
    )
    # Aliases: what is differentiated by is then this call's own, and not a tensor that others lead to as well.
    inputs = [value.view_as(value) for value in (x, *t)]
    y = inputs[0]
    for block in plan.blocks:
        y = _plain_block(plan, block, y, inputs[1:])
    wanted = [value for value, want in zip(inputs, needs, strict=True) if want]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in needs]


def _plain_block(plan: Plan, block: Block, x: Tensor, t: Sequence[Tensor]) -> Tensor:
    """The block in plain PyTorch, with the statistics of the batch or those that were given."""

    def act(norm: Norm, u: Tensor) -> Tensor:
        affine = (get(t, norm.weight), get(t, norm.bias))
        if norm.kind == BATCH:
            y = F.batch_norm(u, None, None, *affine, True, 0.0, norm.eps)
        elif norm.kind == FIXED:
            mean, rstd = (v[:, None, None].to(u.dtype) for v in (t[norm.mean], t[norm.rstd]))
            y = (u - mean) * rstd
            for vector, op in zip(affine, (torch.mul, torch.add), strict=True):
                y = y if vector is None else op(y, vector[:, None, None])
        else:
            y = F.group_norm(u, norm.num_groups, *affine, norm.eps)
        return reference.torch_activation(y, norm.activation)

    def convolve(conv: Conv, z: Tensor) -> Tensor:
        weight, bias = t[conv.weight].to(plan.z_dtype), get(t, conv.bias)
        bias = None if bias is None else bias.to(plan.z_dtype)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return torch.conv2d(z.to(plan.z_dtype), weight, bias, *geometry)

    us, fs = [x], []
    for i, row in enumerate(block.rows):
        z = act(block.norm1, us[-1])
        fs.append(convolve(block.conv2, act(block.norm2, convolve(block.conv1, z))))
        numbers = [k.number for k in row]
        if block.coefficients is not None:
            start = block.offset(i)
            numbers = t[block.coefficients][start : start + len(row)]
        u = sum(c * (fs if k.of_slope else us)[k.index] for c, k in zip(numbers, row, strict=True))
        if block.shortcut is not None:
            conv, norm = block.shortcut
            u = u + act(norm, convolve(conv, z))
        us.append(u)
    return us[-1]
