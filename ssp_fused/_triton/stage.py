"""Combination and moments: reference.stage_combine and stage_moments."""

import triton
import triton.language as tl

from .pieces import (
    across,
    channels_of_sweep,
    combine,
    load,
    per_channel,
    reciprocal_deviation,
    store,
    sweep_corner,
    sweep_mask,
    tile,
)


@triton.jit(do_not_specialize=["lines", "units", "channels"])
def combine_kernel(
    terms,
    coefficients,
    coefficient_tensor,
    bias,
    u,
    lines,
    units,
    channels,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
):
    """reference.stage_combine."""
    length = units * UNIT
    _, _, offset, mask, channel, _, exists = tile(
        lines, length, channels, 1, LINES, LENGTH, ROWS, False
    )
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    value = combine(terms, coefficients, coefficient_tensor, shift, offset, mask, STAGE)
    store(u, offset, value, mask)


@triton.jit(do_not_specialize=["batch", "lines", "units", "splits", "channels", "size"])
def moments_kernel(
    terms,
    coefficients,
    coefficient_tensor,
    bias,
    u,
    partial,
    batch,
    lines,
    units,
    splits,
    channels,
    size,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
):
    """reference.stage_moments: u, and each share's mean, sum of squared deviations and count.

    Every element of the tile keeps moments of its own over the steps (B. P. Welford, "Note on a Method for
    Calculating Corrected Sums of Squares and Products", 1962), which are merged at the end (Chan et al., 1979).
    """
    length = units * UNIT
    sample, first, steps, base, stride, first_line, first_column, slot, slots = sweep_corner(
        batch, lines, length, splits, LINES, LENGTH, ROWS
    )
    channel, exists = channels_of_sweep(
        first_line, first_column, lines, length, LINES, LENGTH, ROWS
    )
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    place = tl.arange(0, LINES)[:, None] * length + tl.arange(0, LENGTH)[None, :]

    mean = tl.zeros((LINES, LENGTH), tl.float32)
    m2 = tl.zeros((LINES, LENGTH), tl.float32)
    count = tl.zeros((LINES,), tl.float32)
    for step in range(first, steps, splits):
        line, column = sweep_mask(
            step, first_line, first_column, lines, length, LINES, LENGTH, ROWS
        )
        mask = line[:, None] & column[None, :]
        offset = base + step * stride + place
        value = combine(terms, coefficients, coefficient_tensor, shift, offset, mask, STAGE)
        if u is not None:
            store(u, offset, value, mask)
        count += line.to(tl.float32)
        weight = (1.0 / tl.maximum(count, 1.0))[:, None]
        delta = tl.where(mask, value.to(tl.float32) - mean, 0.0)
        mean = tl.fma(delta, weight, mean)
        m2 = tl.fma(delta * delta, 1.0 - weight, m2)

    axis: tl.constexpr = 0 if ROWS else 1
    column = tl.arange(0, LENGTH) < length - first_column
    weight = count[:, None] * column[None, :].to(tl.float32)
    total = tl.sum(weight, axis)
    centre = tl.sum(weight * mean, axis) / tl.maximum(total, 1.0)
    delta = mean - across(centre, ROWS)
    squares = tl.sum(m2 + weight * delta * delta, axis)
    # What rounding left of the deviations' sum belongs to the mean.
    centre += tl.sum(weight * delta, axis) / tl.maximum(total, 1.0)
    at = (sample * slots + slot) * channels + channel
    store(partial, at, centre, exists)
    store(partial + size, at, squares, exists)
    store(partial + 2 * size, at, total, exists)


@triton.jit(do_not_specialize=["slots", "groups", "size", "eps"])
def merge_moments_kernel(
    partial,
    mean,
    variance,
    rstd,
    slots,
    groups,
    per_group,
    size,
    eps,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """reference._moments from shares: the moments of groups of ``per_group`` channels, merged in fixed order.

    Deviations of the shares' means are taken from the first share's, so that large means cost no digits.
    """
    blocks = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)
    exists = group < groups
    base = sample * slots * groups * per_group
    parts = slots * per_group
    pivot = load(partial, base + group * per_group, exists)
    total = tl.zeros((GROUPS,), tl.float32)
    shifted = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, parts, PARTS):
        offset, mask = _shares(base, first, parts, group, exists, groups, per_group, PARTS)
        count = load(partial + 2 * size, offset, mask)
        total += tl.sum(count, 0)
        shifted += tl.sum(count * (load(partial, offset, mask) - pivot[None, :]), 0)
    drift = shifted / tl.maximum(total, 1.0)
    squares = tl.zeros((GROUPS,), tl.float32)
    rest = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, parts, PARTS):
        offset, mask = _shares(base, first, parts, group, exists, groups, per_group, PARTS)
        delta = load(partial, offset, mask) - pivot[None, :] - drift[None, :]
        count = load(partial + 2 * size, offset, mask)
        squares += tl.sum(load(partial + size, offset, mask) + count * delta * delta, 0)
        rest += tl.sum(count * delta, 0)
    at = sample * groups + group
    var = squares / tl.maximum(total, 1.0)
    store(mean, at, pivot + (drift + rest / tl.maximum(total, 1.0)), exists)
    if variance is not None:
        store(variance, at, var, exists)
    if rstd is not None:
        store(rstd, at, reciprocal_deviation(var, eps), exists)


@triton.jit
def _shares(base, first, parts, group, exists, groups, per_group, PARTS: tl.constexpr):
    """Offsets of a tile of shares ``[PARTS, groups]``, and which of them exist."""
    part = first + tl.arange(0, PARTS)
    at = part // per_group * (groups * per_group) + part % per_group
    offset = base + at[:, None] + (group * per_group)[None, :]
    return offset, (part < parts)[:, None] & exists[None, :]
