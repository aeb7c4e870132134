"""Group norm: reference.stage_group_norm_act and group_norm_act_backward, where a sample's group stays on chip.

A program keeps whole groups. Its channels are ``[GROUPS, SLOTS]``: each group has as many slots as the next power
of two. Where groups are too large, the kernels of the other files do the same
in two passes, and ``group_sums_kernel`` does what stands between them in backward.
"""

import triton
import triton.language as tl

from .pieces import (
    across,
    activate,
    activation_backward,
    affine,
    combine,
    input_gradient,
    load,
    normalized,
    number,
    per_channel,
    reciprocal_deviation,
    store,
    weighted_sum,
)


@triton.jit
def _channels(channels, GROUPS: tl.constexpr, SLOTS: tl.constexpr, PER_GROUP: tl.constexpr):
    """This program's sample and channels, and which of these exist."""
    width: tl.constexpr = GROUPS * PER_GROUP
    blocks = tl.cdiv(channels, width)
    slot = tl.arange(0, GROUPS * SLOTS)
    if SLOTS == PER_GROUP or GROUPS == 1:
        place = slot
        exists = slot < width
    else:
        place = slot // SLOTS * PER_GROUP + slot % SLOTS
        exists = slot % SLOTS < PER_GROUP
    channel = tl.program_id(0) % blocks * width + place
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    return sample, channel, exists & (channel < channels)


@triton.jit
def _places(sample, channel, exists, lines, length, PLACES: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the elements of a sample's channels, and which of them exist."""
    place = tl.arange(0, PLACES)
    if ROWS:
        inner = place[:, None] * length + channel[None, :]
        mask = (place < lines)[:, None] & exists[None, :]
    else:
        inner = channel[:, None] * length + place[None, :]
        mask = exists[:, None] & (place < length)[None, :]
    return sample * lines * length + inner, mask


@triton.jit
def _over_channel(value, mask, ROWS: tl.constexpr):
    return tl.sum(tl.where(mask, value, 0.0), 0 if ROWS else 1)


@triton.jit
def _over_group(value, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Each group's sum of a vector over channels, in all of the group's places."""
    if SLOTS == 1:
        return value
    else:
        total = tl.sum(tl.reshape(value, (GROUPS, SLOTS)), 1)
        spread = tl.broadcast_to(total[:, None], (GROUPS, SLOTS))
        return tl.reshape(spread, (GROUPS * SLOTS,))


@triton.jit(do_not_specialize=["eps", "lines", "units"])
def group_norm_kernel(
    terms,
    coefficients,
    coefficient_tensor,
    bias,
    gamma,
    beta,
    eps,
    u,
    z,
    mean,
    rstd,
    lines,
    units,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """reference.stage_group_norm_act."""
    length = units * UNIT
    channels, positions = (length, lines) if ROWS else (lines, length)
    sample, channel, exists = _channels(channels, GROUPS, SLOTS, PER_GROUP)
    offset, mask = _places(sample, channel, exists, lines, length, PLACES, ROWS)
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    value = combine(terms, coefficients, coefficient_tensor, shift, offset, mask, STAGE)
    if u is not None:
        store(u, offset, value, mask)
    value = value.to(tl.float32)
    m = PER_GROUP * positions.to(tl.float32)
    centre = _over_group(_over_channel(value, mask, ROWS), GROUPS, SLOTS) / m
    delta = value - across(centre, ROWS)
    variance = _over_group(_over_channel(delta * delta, mask, ROWS), GROUPS, SLOTS) / m
    deviation = reciprocal_deviation(variance, eps)
    at = (sample * channels + channel) // PER_GROUP
    first = exists & (channel % PER_GROUP == 0)
    store(mean, at, centre, first)
    store(rstd, at, deviation, first)
    y = affine(
        normalized(value, across(centre, ROWS), across(deviation, ROWS)),
        per_channel(gamma, channel, exists, 1.0, ROWS),
        per_channel(beta, channel, exists, 0.0, ROWS),
    )
    store(z, offset, activate(y, ACTIVATION), mask)


@triton.jit(do_not_specialize=["scale", "lines", "units", "size"])
def group_norm_backward_kernel(
    dz,
    scale,
    scale_tensor,
    u,
    bias,
    mean,
    rstd,
    gamma,
    beta,
    extras,
    extra_coefficients,
    extra_coefficient_tensor,
    du,
    z,
    sums,
    lines,
    units,
    size,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """reference.group_norm_act_backward; ``sums [3, N, C]``: of dy, of dy * xhat, of du before the extras."""
    length = units * UNIT
    channels, positions = (length, lines) if ROWS else (lines, length)
    sample, channel, exists = _channels(channels, GROUPS, SLOTS, PER_GROUP)
    offset, mask = _places(sample, channel, exists, lines, length, PLACES, ROWS)
    at = (sample * channels + channel) // PER_GROUP
    deviation = per_channel(rstd, at, exists, 1.0, ROWS)
    factor = per_channel(gamma, channel, exists, 1.0, ROWS)
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    value = combine((u,), (1.0,), None, shift, offset, mask, STAGE)
    xhat = normalized(value.to(tl.float32), per_channel(mean, at, exists, 0.0, ROWS), deviation)
    y = affine(xhat, factor, per_channel(beta, channel, exists, 0.0, ROWS))
    if z is not None:
        store(z, offset, activate(y, ACTIVATION), mask)
    upstream = number(scale, scale_tensor) * load(dz, offset, mask)
    dy = activation_backward(upstream, y, ACTIVATION)

    entry = sample * channels + channel
    store(sums, entry, _over_channel(dy, mask, ROWS), exists)
    store(sums + size, entry, _over_channel(dy * xhat, mask, ROWS), exists)
    m = PER_GROUP * positions.to(tl.float32)
    gamma_dy = factor * dy
    mean_dy = _over_group(_over_channel(gamma_dy, mask, ROWS), GROUPS, SLOTS) / m
    mean_dy_xhat = _over_group(_over_channel(gamma_dy * xhat, mask, ROWS), GROUPS, SLOTS) / m
    own = input_gradient(
        dy, xhat, deviation, factor, across(mean_dy, ROWS), across(mean_dy_xhat, ROWS)
    )
    store(sums + 2 * size, entry, _over_channel(own, mask, ROWS), exists)
    if len(extras) > 0:
        own += weighted_sum(extras, extra_coefficients, extra_coefficient_tensor, offset, mask)
    store(du, offset, own, mask)


@triton.jit(do_not_specialize=["channels", "positions", "size"])
def group_sums_kernel(
    sums,
    rstd,
    gamma,
    group_dy,
    group_dy_xhat,
    channels,
    positions,
    size,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Between the passes of reference.group_norm_act_backward: sums of gamma dy and gamma dy xhat over groups.

    ``sums [3, N, C]`` holds the sums of dy, dy * xhat and xhat; the last is replaced by that of du before the extras.
    """
    sample, channel, exists = _channels(channels, GROUPS, SLOTS, PER_GROUP)
    entry = sample * channels + channel
    at = entry // PER_GROUP
    if gamma is None:
        factor = 1.0
    else:
        factor = load(gamma, channel, exists)
    dy = factor * load(sums, entry, exists)
    total_dy = _over_group(dy, GROUPS, SLOTS)
    total_dy_xhat = _over_group(factor * load(sums + size, entry, exists), GROUPS, SLOTS)
    first = exists & (channel % PER_GROUP == 0)
    store(group_dy, at, total_dy, first)
    store(group_dy_xhat, at, total_dy_xhat, first)
    m = PER_GROUP * positions.to(tl.float32)
    xhat = load(sums + 2 * size, entry, exists)
    own = dy - total_dy / m * positions - xhat * (total_dy_xhat / m)
    store(sums + 2 * size, entry, load(rstd, at, exists) * own, exists)
