"""The ops of the backward pass: checks, allocation and launches. What each computes: ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._layout import is_rows, mask_shape
from .._ops import ACTIVATIONS
from . import launch as table
from . import operands
from .backward_apply import apply_kernel
from .backward_reduce import reduce_kernel
from .group_norm import group_norm_backward_kernel, group_sums_kernel
from .operands import Checks, Extras, device_of, narrowest, widest
from .reductions import sum_shares
from .upstream import Upstream, upstream

# Elements that a program keeps of dy and of xhat.
_ON_CHIP = 8192


def norm_act_backward_reduce(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.norm_act_backward_reduce."""
    given = upstream(
        "norm_act_backward_reduce",
        dz,
        scale,
        scale_tensor,
        u,
        mean,
        rstd,
        gamma,
        beta,
        activation,
        rows=is_rows(u),
        statistics=(dz.shape[1] if dz.dim() > 1 else 0,),
    )
    z = given.z(write_z)
    return *_reduce(given, z), _wanted(z, dz)


def _wanted(z: Tensor | None, dz: Tensor) -> Tensor:
    return dz.new_empty(0) if z is None else z


def _reduce(given: Upstream, z: Tensor | None) -> tuple[Tensor, ...]:
    """Sums of dy and dy * xhat per channel ``[C]``; per sample and channel ``[N, C]`` also of xhat. Writes z."""
    n, c = given.dz.shape[:2]
    shape = (n, c) if given.per_sample else (c,)
    kinds = 3 if given.per_sample else 2
    if given.dz.numel() == 0:
        return tuple(given.sums(*shape).zero_() for _ in range(kinds))
    matrix = table.sweep_matrix(given.dz.shape, given.rows, per_sample=given.per_sample)
    sizes = narrowest(given.dz, given.u), widest(given.dz, given.u)
    chosen = table.sweep(matrix, 2, *sizes, device_of(given.dz))
    partial = given.sums(kinds, matrix.samples, chosen.slots, c)
    operands.launch(
        reduce_kernel,
        given.dz,
        chosen.programs,
        {
            **given.arguments(),
            "z": z,
            "partial": partial,
            "per_group": given.per_group,
            "size": partial[0].numel(),
            "PER_SAMPLE": given.per_sample,
            **operands.sweep_arguments(matrix, chosen),
        },
        chosen.tile.warps,
    )
    return sum_shares(partial, shape)


def norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
    count_tensor: Tensor | None,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    du_dtype: torch.dtype | None,
) -> Tensor:
    """reference.norm_act_backward."""
    rows = mask.dim() == 2 if mask is not None else is_rows(dz if u is None else u)
    c = dz.shape[1] if dz.dim() > 1 else 0
    given = upstream(
        "norm_act_backward",
        dz,
        scale,
        scale_tensor,
        u,
        None if u is None else mean,
        rstd,
        gamma,
        beta,
        activation,
        rows=rows,
        statistics=(c,),
    )
    checks = given.checks
    _check_kind(checks, u, mask, mean, activation, sum_dy, sum_dy_xhat)
    if mask is not None:
        shape = mask_shape(dz.shape, rows)
        checks.require(
            mask.device == dz.device and mask.dtype == torch.uint8 and mask.shape == shape,
            lambda: (
                f"mask must be uint8 on {dz.device} of the shape {list(shape)}, "
                f"but is {mask.dtype} on {mask.device} of {list(mask.shape)}"
            ),
        )
    sums = (checks.vector("sum_dy", sum_dy, c), checks.vector("sum_dy_xhat", sum_dy_xhat, c))
    checks.numbers("count_tensor", [count], count_tensor, 1)
    du = given.empty(checks.result("du_dtype", du_dtype, dz.dtype if u is None else u.dtype))
    more = (extras, extra_coefficients, extra_coefficient_tensor)
    added = operands.extras(checks, *more, dz, rows, du.dtype)
    if sum_dy is None and ACTIVATIONS[activation] == "identity":
        given = replace(given, u=None, mean=None)  # du does not depend on it
    _apply(given, operands.pointer(mask), sums, count, count_tensor, added, du)
    return du


def _check_kind(
    checks: Checks,
    u: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    activation: int,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
) -> None:
    """What norm_act_backward may be given together."""
    checks.require(
        u is None or mask is None, lambda: "u must be None where mask is given, but both are"
    )
    checks.require(
        (u is None) == (mean is None) or mask is not None,
        lambda: "mean must be given with u, and only then",
    )
    checks.require(
        u is not None or mask is not None or ACTIVATIONS[activation] == "identity",
        lambda: "u or mask must be given, but both are None",
    )
    checks.require(
        mask is None or ACTIVATIONS[activation] != "silu",
        lambda: "mask must be None for silu, whose derivative is not one of two values",
    )
    checks.require(
        (sum_dy is None) == (sum_dy_xhat is None),
        lambda: "sum_dy and sum_dy_xhat must be given together, but one is None",
    )
    checks.require(
        u is not None or sum_dy is None, lambda: "u must be given where sums are, but is None"
    )


def _apply(
    given: Upstream,
    bits: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    count: float,
    count_tensor: Tensor | None,
    extras: Extras,
    du: Tensor,
) -> None:
    if du.numel() == 0:
        return
    matrix = table.pointwise_matrix(
        du.shape, given.rows, per_sample=given.per_sample, bits=bits is not None
    )
    activations = (given.dz, given.u, du, *extras.tensors)
    sizes = narrowest(*activations), widest(*activations)
    reads = 1 + (given.u is not None) + len(extras.tensors)
    chosen = table.pointwise(matrix, reads, *sizes, device_of(du))
    operands.launch(
        apply_kernel,
        du,
        chosen.programs,
        {
            **given.arguments(),
            **extras.arguments(),
            "bits": bits,
            "sum_dy": sums[0],
            "sum_dy_xhat": sums[1],
            "count": count,
            "count_tensor": count_tensor,
            "du": du,
            "per_group": given.per_group,
            "PER_SAMPLE": given.per_sample,
            **operands.tile_arguments(matrix, chosen.tile),
        },
        chosen.tile.warps,
        chosen.registers,
    )


def batch_norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.batch_norm_act_backward, as the two launches."""
    rows, c = is_rows(u), dz.shape[1] if dz.dim() > 1 else 0
    norm = (u, mean, rstd, gamma, beta, activation)
    given = upstream(
        "batch_norm_act_backward", dz, scale, scale_tensor, *norm, rows=rows, statistics=(c,)
    )
    more = (extras, extra_coefficients, extra_coefficient_tensor)
    added = operands.extras(given.checks, *more, dz, rows, u.dtype)
    z = given.z(write_z)
    du = given.empty(u.dtype)
    sums = _reduce(given, z)
    count = max(u.numel() // max(c, 1), 1)
    _apply(given, None, sums, count, None, added, du)
    return du, *sums, _wanted(z, dz)


def group_norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    channel_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reference.group_norm_act_backward: one launch and a sum over samples where groups stay on chip."""
    op, rows = "group_norm_act_backward", is_rows(u)
    checks = Checks(op, dz.device)
    checks.activation("dz", dz)
    checks.require(
        mean.dim() == 2,
        lambda: f"mean must have the shape [N, num_groups], but has {list(mean.shape)}",
    )
    (n, c), num_groups = dz.shape[:2], mean.shape[1]
    checks.groups(num_groups, c)
    norm = (u, mean, rstd, gamma, beta, activation)
    given = upstream(
        op,
        dz,
        scale,
        scale_tensor,
        *norm,
        rows=rows,
        statistics=(n, num_groups),
        channel_bias=channel_bias,
    )
    more = (extras, extra_coefficients, extra_coefficient_tensor)
    added = operands.extras(checks, *more, dz, rows, u.dtype)
    z = given.z(write_z)
    du = given.empty(u.dtype)
    if du.numel() == 0:
        d_beta, d_gamma, own = (given.sums(c).zero_() for _ in range(3))
    else:
        sums = _group_norm_backward(given, added, du, z)
        d_beta, d_gamma, own = sum_shares(sums, (c,))
    if num_groups == c:  # Over a group du sums to zero.
        own = torch.zeros_like(own)
    return du, d_gamma, d_beta, own, _wanted(z, dz)


def _group_norm_backward(given: Upstream, extras: Extras, du: Tensor, z: Tensor | None) -> Tensor:
    """Sums of dy, dy * xhat and du before the extras, for each sample and channel; writes du and z."""
    n, c = du.shape[:2]
    per_group, num_groups = given.per_group, c // given.per_group
    matrix = table.sweep_matrix(du.shape, given.rows, per_sample=True)
    itemsize = narrowest(given.dz, given.u, *extras.tensors)
    chosen = table.groups(matrix, num_groups, itemsize, _ON_CHIP)
    if chosen is not None:
        sums = given.sums(3, n, c)
        operands.launch(
            group_norm_backward_kernel,
            du,
            chosen.programs,
            {
                **given.arguments(),
                **extras.arguments(),
                "du": du,
                "z": z,
                "sums": sums,
                "size": n * c,
                **operands.group_arguments(matrix, chosen, per_group),
            },
            chosen.warps,
        )
        return sums
    sums = torch.stack(_reduce(given, z))
    group_dy, group_dy_xhat = (given.sums(n, num_groups) for _ in range(2))
    positions = du.numel() // (n * c)
    small = table.group_table(num_groups, per_group, n)
    operands.launch(
        group_sums_kernel,
        du,
        small.programs,
        {
            "sums": sums,
            "rstd": given.rstd,
            "gamma": given.gamma,
            "group_dy": group_dy,
            "group_dy_xhat": group_dy_xhat,
            "channels": c,
            "positions": positions,
            "size": n * c,
            "GROUPS": small.groups,
            "SLOTS": small.slots,
            "PER_GROUP": per_group,
        },
        small.warps,
    )
    count = per_group * positions
    _apply(given, None, (group_dy, group_dy_xhat), count, None, extras, du)
    return sums
