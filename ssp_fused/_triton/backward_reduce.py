"""Backward reduction: reference.norm_act_backward_reduce, channel_sum and stage_dots."""

import triton
import triton.language as tl

from .pieces import (
    activate,
    activation_backward,
    affine,
    channels_of_sweep,
    combine,
    load,
    normalized,
    number,
    per_channel,
    store,
    sweep_corner,
    sweep_mask,
)


@triton.jit(
    do_not_specialize=[
        "scale",
        "batch",
        "lines",
        "units",
        "splits",
        "channels",
        "per_group",
        "size",
    ]
)
def reduce_kernel(
    dz,
    scale,
    scale_tensor,
    u,
    bias,
    mean,
    rstd,
    gamma,
    beta,
    z,
    partial,
    batch,
    lines,
    units,
    splits,
    channels,
    per_group,
    size,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    """reference.norm_act_backward_reduce: each share's sums of dy and dy * xhat, and z.

    PER_SAMPLE: with statistics ``[N, num_groups]``, and also the sum of xhat, as group_norm_act_backward needs it.
    """
    length = units * UNIT
    sample, first, steps, base, stride, first_line, first_column, slot, slots = sweep_corner(
        batch, lines, length, splits, LINES, LENGTH, ROWS
    )
    channel, exists = channels_of_sweep(
        first_line, first_column, lines, length, LINES, LENGTH, ROWS
    )
    if PER_SAMPLE:
        statistic = (sample * channels + channel) // per_group
    else:
        statistic = channel
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    centre = per_channel(mean, statistic, exists, 0.0, ROWS)
    deviation = per_channel(rstd, statistic, exists, 1.0, ROWS)
    factor = per_channel(gamma, channel, exists, 1.0, ROWS)
    offset_of_y = per_channel(beta, channel, exists, 0.0, ROWS)
    scale = number(scale, scale_tensor)
    place = tl.arange(0, LINES)[:, None] * length + tl.arange(0, LENGTH)[None, :]

    sum_dy = tl.zeros((LINES, LENGTH), tl.float32)
    sum_dy_xhat = tl.zeros((LINES, LENGTH), tl.float32)
    sum_xhat = tl.zeros((LINES, LENGTH), tl.float32)
    for step in range(first, steps, splits):
        line, column = sweep_mask(
            step, first_line, first_column, lines, length, LINES, LENGTH, ROWS
        )
        mask = line[:, None] & column[None, :]
        offset = base + step * stride + place
        upstream = scale * load(dz, offset, mask)
        value = combine((u,), (1.0,), None, shift, offset, mask, STAGE)
        xhat = normalized(value.to(tl.float32), centre, deviation)
        y = affine(xhat, factor, offset_of_y)
        if z is not None:
            store(z, offset, activate(y, ACTIVATION), mask)
        dy = activation_backward(upstream, y, ACTIVATION)
        # 0 where dz is read as 0, outside the tensor.
        sum_dy += dy
        sum_dy_xhat += dy * xhat
        if PER_SAMPLE:
            sum_xhat += tl.where(mask, xhat, 0.0)

    axis: tl.constexpr = 0 if ROWS else 1
    at = (sample * slots + slot) * channels + channel
    store(partial, at, tl.sum(sum_dy, axis), exists)
    store(partial + size, at, tl.sum(sum_dy_xhat, axis), exists)
    if PER_SAMPLE:
        store(partial + 2 * size, at, tl.sum(sum_xhat, axis), exists)


@triton.jit(do_not_specialize=["batch", "lines", "units", "splits", "channels"])
def channel_sum_kernel(
    g,
    partial,
    batch,
    lines,
    units,
    splits,
    channels,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """reference.channel_sum: each share's sums."""
    length = units * UNIT
    sample, first, steps, base, stride, first_line, first_column, slot, slots = sweep_corner(
        batch, lines, length, splits, LINES, LENGTH, ROWS
    )
    channel, exists = channels_of_sweep(
        first_line, first_column, lines, length, LINES, LENGTH, ROWS
    )
    place = tl.arange(0, LINES)[:, None] * length + tl.arange(0, LENGTH)[None, :]
    total = tl.zeros((LINES, LENGTH), tl.float32)
    for step in range(first, steps, splits):
        line, column = sweep_mask(
            step, first_line, first_column, lines, length, LINES, LENGTH, ROWS
        )
        total += load(g, base + step * stride + place, line[:, None] & column[None, :])
    store(
        partial,
        (sample * slots + slot) * channels + channel,
        tl.sum(total, 0 if ROWS else 1),
        exists,
    )


@triton.jit(do_not_specialize=["units"])
def dots_kernel(g, terms, partial, units, UNIT: tl.constexpr, LENGTH: tl.constexpr):
    """reference.stage_dots: each tile's <g, t_k>."""
    slot = tl.program_id(0).to(tl.int64)
    offset = slot * LENGTH + tl.arange(0, LENGTH)
    mask = offset < units.to(tl.int64) * UNIT
    gradient = load(g, offset, mask)
    for k in tl.static_range(len(terms)):
        dot = tl.sum(gradient * load(terms[k], offset, mask), 0)
        tl.store(partial + slot * len(terms) + k, dot)


@triton.jit(do_not_specialize=["slots", "channels", "size"])
def sum_shares_kernel(
    partial, totals, slots, channels, size, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sums of ``partial [kinds, tables, slots, channels]`` over the slots, in fixed order; a result for each kind."""
    blocks = tl.cdiv(channels, CHANNELS)
    table = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    for k in tl.static_range(len(totals)):
        sums = tl.zeros((CHANNELS,), tl.float32)
        for first in range(0, slots, PARTS):
            slot = first + tl.arange(0, PARTS)
            offset = (table * slots + slot[:, None]) * channels + channel[None, :]
            mask = (slot < slots)[:, None] & exists[None, :]
            sums += tl.sum(load(partial + k * size, offset, mask), 0)
        store(totals[k], table * channels + channel, sums, exists)
