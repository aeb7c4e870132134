"""Batch statistics over a group of processes: Chan's merge in rank order, and the sums of its backward."""

from __future__ import annotations

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
