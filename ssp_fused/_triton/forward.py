"""The ops of the forward pass: checks, allocation and launches. What each computes: ``reference``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import mask_shape
from . import launch as table
from . import operands
from .group_norm import group_norm_kernel
from .normalize import normalize_kernel
from .operands import Stage, device_of, narrowest, widest
from .running_stats import update_kernel
from .stage import combine_kernel, merge_moments_kernel, moments_kernel

# Elements that a program keeps of the stage.
_ON_CHIP = 16384


def stage_combine(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
) -> Tensor:
    """reference.stage_combine."""
    stage = operands.stage("stage_combine", terms, coefficients, coefficient_tensor, channel_bias)
    u = stage.empty()
    if u.numel() == 0:
        return u
    if channel_bias is None:
        matrix = table.flat_matrix(u.shape)
    else:
        matrix = table.pointwise_matrix(u.shape, stage.rows)
    sizes = narrowest(*stage.terms, u), widest(*stage.terms, u)
    chosen = table.pointwise(matrix, len(terms), *sizes, device_of(u))
    operands.launch(
        combine_kernel,
        u,
        chosen.programs,
        {**stage.arguments(), "u": u, **operands.tile_arguments(matrix, chosen.tile)},
        chosen.tile.warps,
        chosen.registers,
    )
    return u


def stage_moments(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.stage_moments."""
    stage = operands.stage("stage_moments", terms, coefficients, coefficient_tensor, channel_bias)
    u = stage.empty() if write_u else None
    mean, variance, _ = _moments(stage, u, 0.0)
    return stage.unwanted() if u is None else u, mean, variance


def _moments(
    stage: Stage, u: Tensor | None, eps: float, num_groups: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and rstd of each channel, or of each sample's groups; writes u."""
    n, c = stage.like.shape[:2]
    per_sample = num_groups is not None
    groups = num_groups if per_sample else c
    shape = (n, groups) if per_sample else (c,)
    mean, variance, rstd = (stage.statistics(*shape) for _ in range(3))
    if stage.like.numel() == 0:
        return mean.zero_(), variance.zero_(), rstd.fill_(eps).rsqrt_()
    matrix = table.sweep_matrix(stage.like.shape, stage.rows, per_sample=per_sample)
    itemsize = narrowest(*stage.terms, u)
    # Its moments take as many registers as an operand does.
    reads = len(stage.terms) + 1
    chosen = table.sweep(matrix, reads, itemsize, stage.dtype.itemsize, device_of(stage.like))
    partial = stage.statistics(3, matrix.samples, chosen.slots, c)
    operands.launch(
        moments_kernel,
        stage.like,
        chosen.programs,
        {
            **stage.arguments(),
            "u": u,
            "partial": partial,
            "size": partial[0].numel(),
            **operands.sweep_arguments(matrix, chosen),
        },
        chosen.tile.warps,
    )
    parts = chosen.slots * (c // groups)
    merge = table.merge(matrix.samples, parts, groups, device_of(stage.like))
    operands.launch(
        merge_moments_kernel,
        stage.like,
        merge.programs,
        {
            "partial": partial,
            "mean": mean,
            "variance": variance,
            "rstd": rstd,
            "slots": chosen.slots,
            "groups": groups,
            "per_group": c // groups,
            "size": partial[0].numel(),
            "eps": eps,
            "PARTS": merge.parts,
            "GROUPS": merge.width,
        },
        merge.warps,
    )
    return mean, variance, rstd


def stage_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
    write_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.stage_norm_act."""
    stage = operands.stage("stage_norm_act", terms, coefficients, coefficient_tensor, channel_bias)
    checks, c = stage.checks, terms[0].shape[1]
    checks.code(activation)
    statistics = (checks.vector("mean", mean, c), checks.vector("rstd", rstd, c))
    affine = (checks.vector("gamma", gamma, c), checks.vector("beta", beta, c))
    u = stage.empty() if write_u else None
    z = stage.empty(checks.result("z_dtype", z_dtype, stage.dtype))
    bits = None
    if write_mask:
        shape = mask_shape(z.shape, stage.rows)
        bits = z.new_empty(shape, dtype=torch.uint8)
    _normalize(stage, *statistics, *affine, activation, u, z, bits)
    return (
        stage.unwanted() if u is None else u,
        z,
        stage.unwanted(torch.uint8) if bits is None else bits,
    )


def _normalize(
    stage: Stage,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    u: Tensor | None,
    z: Tensor,
    bits: Tensor | None,
) -> None:
    """Writes z, and u and the mask bits where they are wanted; statistics ``[C]`` or ``[N, num_groups]``."""
    if z.numel() == 0:
        return
    per_sample = mean.dim() == 2
    matrix = table.pointwise_matrix(
        z.shape, stage.rows, per_sample=per_sample, bits=bits is not None
    )
    sizes = narrowest(*stage.terms, u, z), widest(*stage.terms, u, z)
    # Packing bits takes as many registers as an operand does.
    operands_read = len(stage.terms) + (bits is not None)
    chosen = table.pointwise(matrix, operands_read, *sizes, device_of(z))
    operands.launch(
        normalize_kernel,
        z,
        chosen.programs,
        {
            **stage.arguments(),
            "mean": mean,
            "rstd": rstd,
            "gamma": gamma,
            "beta": beta,
            "u": u,
            "z": z,
            "bits": bits,
            "per_group": z.shape[1] // mean.shape[-1],
            "ACTIVATION": activation,
            "PER_SAMPLE": per_sample,
            **operands.tile_arguments(matrix, chosen.tile),
        },
        chosen.tile.warps,
        chosen.registers,
    )


def stage_batch_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reference.stage_batch_norm_act, as the two launches."""
    stage = operands.stage(
        "stage_batch_norm_act", terms, coefficients, coefficient_tensor, channel_bias
    )
    checks, c = stage.checks, terms[0].shape[1]
    checks.code(activation)
    checks.eps(eps)
    affine = (checks.vector("gamma", gamma, c), checks.vector("beta", beta, c))
    z = stage.empty(checks.result("z_dtype", z_dtype, stage.dtype))
    # Even where u is not wanted: the second pass reads one tensor, not all the terms again.
    u = stage.empty() if write_u or not stage.is_copy else None
    mean, variance, rstd = _moments(stage, u, eps)
    stored = stage if u is None else stage.stored(u)
    _normalize(stored, mean, rstd, *affine, activation, None, z, None)
    return u if write_u else stage.unwanted(), z, mean, variance, rstd


def stage_group_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    num_groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.stage_group_norm_act: one launch where groups stay on chip, else three."""
    stage = operands.stage(
        "stage_group_norm_act", terms, coefficients, coefficient_tensor, channel_bias
    )
    checks, (n, c) = stage.checks, terms[0].shape[:2]
    checks.code(activation)
    checks.eps(eps)
    checks.groups(num_groups, c)
    affine = (checks.vector("gamma", gamma, c), checks.vector("beta", beta, c))
    z = stage.empty(checks.result("z_dtype", z_dtype, stage.dtype))
    u = stage.empty() if write_u else None
    if z.numel() == 0:
        nothing = stage.statistics(n, num_groups).fill_(torch.nan)
        return stage.unwanted() if u is None else u, z, nothing, nothing.clone()
    matrix = table.sweep_matrix(z.shape, stage.rows, per_sample=True)
    itemsize = narrowest(*stage.terms, u, z)
    # More terms need registers of their own.
    capacity = _ON_CHIP if len(stage.terms) <= 2 else _ON_CHIP // 2
    chosen = table.groups(matrix, num_groups, itemsize, capacity)
    if chosen is None:
        if u is None and not stage.is_copy:
            u = stage.empty()
        mean, _, rstd = _moments(stage, u, eps, num_groups)
        stored = stage if u is None else stage.stored(u)
        _normalize(stored, mean, rstd, *affine, activation, None, z, None)
    else:
        mean, rstd = (stage.statistics(n, num_groups) for _ in range(2))
        operands.launch(
            group_norm_kernel,
            z,
            chosen.programs,
            {
                **stage.arguments(),
                "gamma": affine[0],
                "beta": affine[1],
                "eps": eps,
                "u": u,
                "z": z,
                "mean": mean,
                "rstd": rstd,
                "ACTIVATION": activation,
                **operands.group_arguments(matrix, chosen, c // num_groups),
            },
            chosen.warps,
        )
    return u if write_u else stage.unwanted(), z, mean, rstd


def update_running_stats_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    means: Tensor,
    variances: Tensor,
    count: float,
    count_tensor: Tensor | None,
    momentum: float | None,
) -> None:
    """reference.update_running_stats_."""
    checks = operands.Checks("update_running_stats_", means.device)
    checks.floating("means", means)
    checks.require(
        means.dim() == 2,
        lambda: f"means must have the shape [K, C], but has {list(means.shape)}",
    )
    uses, channels = means.shape
    means = means.contiguous()
    variances = checks.vector("variances", variances, uses, channels)
    checks.vector("running_mean", running_mean, channels)
    checks.vector("running_var", running_var, channels)
    checks.numbers("count_tensor", [count], count_tensor, 1)
    tracked = num_batches_tracked
    if tracked is not None:
        checks.require(
            tracked.device == means.device
            and tracked.dtype == torch.int64
            and tracked.numel() == 1,
            lambda: (
                f"num_batches_tracked must be one int64 on {means.device}, "
                f"but is {list(tracked.shape)} of {tracked.dtype} on {tracked.device}"
            ),
        )
    average = momentum is None and tracked is not None
    launched = channels > 0 and uses > 0
    if launched:
        width = 256
        operands.launch(
            update_kernel,
            means,
            table.cdiv(channels, width),
            {
                "running_mean": running_mean,
                "running_var": running_var,
                "tracked": tracked,
                "means": means,
                "variances": variances,
                "count": count,
                "count_tensor": count_tensor,
                "momentum": 0.0 if momentum is None else momentum,
                "mean_stride": 1 if running_mean is None else running_mean.stride(0),
                "var_stride": 1 if running_var is None else running_var.stride(0),
                "uses": uses,
                "channels": channels,
                "CHANNELS": width,
                "AVERAGE": average,
            },
            4,
        )
    if tracked is not None and (average or not launched):
        tracked += uses
