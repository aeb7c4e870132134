"""Batch norm in one process, or with statistics over a group of them: merged in rank order by Chan's formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def process_group(norm: nn.Module) -> Any:
    """The group over which a SyncBatchNorm's batch is spread, None where this process holds all of it."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def stage_batch_norm_act(
    ops: Any,
    operands: tuple,
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
    activation: int,
    z_dtype: torch.dtype,
    write_u: bool,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``ops.stage_batch_norm_act``, the statistics being those of all ranks of ``group``.

    Args:
        ops: Of the backend.
        operands: Terms, coefficients, their tensor, channel bias.
        affine: gamma and beta.
        eps: As the op's, like the arguments that follow.
        activation: Index into ``_ops.ACTIVATIONS``.
        z_dtype: Of z.
        write_u: Whether u is wanted.
        group: None for this process alone.

    Returns:
        u, z, mean, biased variance, rstd; and how many values a channel has over all ranks, None without ``group``.
    """
    if group is None:
        results = ops.stage_batch_norm_act(*operands, *affine, eps, activation, z_dtype, write_u)
        return *results, None
    u, mean, variance = ops.stage_moments(*operands, write_u)
    term = operands[0][0]
    mean, variance, count = merge_moments(mean, variance, term.numel() // term.shape[1], group)
    rstd = (variance + eps).rsqrt()
    if write_u:
        operands = ([u], [1.0], None, None)
    _, z, _ = ops.stage_norm_act(*operands, mean, rstd, *affine, activation, z_dtype, False, False)
    return u, z, mean, variance, rstd, count


def batch_norm_act_backward(
    ops: Any,
    dz: tuple,
    norm: tuple,
    extras: tuple,
    write_z: bool,
    group: Any,
    count: Tensor | None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``ops.batch_norm_act_backward``, the sums within du being those of all ranks of ``group``.

    Args:
        ops: Of the backend.
        dz: dz, its scale and the scale's tensor.
        norm: u, mean, rstd, gamma, beta, activation.
        extras: The later stages' gradients, their coefficients and these' tensor.
        write_z: Whether z is wanted.
        group: None for this process alone.
        count: Of ``stage_batch_norm_act``.
        out: Where du and, if it is wanted, z are written, if there is no ``group``; new tensors, if None.

    Returns:
        du, and of this rank sum dy, sum dy * xhat and z.
    """
    if group is None and out is not None:
        du, z = out
        return du, *ops.batch_norm_act_backward.out(*dz, *norm, *extras, du=du, z=z), z
    if group is None:
        return ops.batch_norm_act_backward(*dz, *norm, *extras, write_z)
    sum_dy, sum_dy_xhat, z = ops.norm_act_backward_reduce(*dz, *norm, write_z)
    u, *rest = norm
    totals = all_reduce_sums(sum_dy, sum_dy_xhat, group)
    du = ops.norm_act_backward(*dz, u, None, *rest, *totals, 1.0, count, *extras, None)
    return du, sum_dy, sum_dy_xhat, z


def refuse_second_derivatives(groups: Iterable[Any]) -> None:
    """Raise where batch statistics are those of a group: autograd would have to differentiate an exchange."""
    if any(group is not None for group in groups):
        raise RuntimeError(
            "create_graph=True is not supported for batch statistics synchronized over processes"
        )


def merge_moments(
    mean: Tensor, variance: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, from each rank's own; ranks may be empty or unequal.

    Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979). Merged in rank order, so that every rank gets the same bits.
    """
    packed = torch.cat([mean, variance * count, mean.new_tensor([float(count)])])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    channels = mean.numel()
    total_mean, total_m2 = torch.zeros_like(mean), torch.zeros_like(mean)
    total = mean.new_zeros(())
    for part in gathered:
        part_mean, part_m2, part_count = part[:channels], part[channels:-1], part[-1]
        joined = total + part_count
        share = part_count / joined.clamp(min=1)
        delta = part_mean - total_mean
        total_mean = total_mean + delta * share
        total_m2 = total_m2 + part_m2 + delta * delta * (total * share)
        total = joined
    return total_mean, total_m2 / total.clamp(min=1), total


def all_reduce_sums(sum_dy: Tensor, sum_dy_xhat: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Both sums over all ranks, in one exchange."""
    sums = torch.stack([sum_dy, sum_dy_xhat])
    dist.all_reduce(sums, group=group)
    return sums[0], sums[1]
