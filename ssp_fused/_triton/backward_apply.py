"""Backward apply: reference.norm_act_backward, and the second pass of group_norm_act_backward."""

import triton
import triton.language as tl

from .pieces import (
    activation_backward,
    affine,
    combine,
    input_gradient,
    load,
    mask_places,
    masked,
    normalized,
    number,
    per_channel,
    store,
    tile,
    unpack_signs,
    weighted_sum,
)


@triton.jit(do_not_specialize=["scale", "count", "lines", "units", "channels", "per_group"])
def apply_kernel(
    dz,
    scale,
    scale_tensor,
    u,
    bias,
    bits,
    mean,
    rstd,
    gamma,
    beta,
    sum_dy,
    sum_dy_xhat,
    count,
    count_tensor,
    extras,
    extra_coefficients,
    extra_coefficient_tensor,
    du,
    lines,
    units,
    channels,
    per_group,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    """reference.norm_act_backward; dy from u, from mask bits, or dz itself (identity).

    PER_SAMPLE: statistics and sums are tables ``[N, num_groups]``, the sums those of gamma dy and gamma dy xhat.
    """
    length = units * UNIT
    first_line, first_column, offset, mask, channel, statistic, exists = tile(
        lines, length, channels, per_group, LINES, LENGTH, ROWS, PER_SAMPLE
    )
    if len(extras) > 0:
        later = weighted_sum(extras, extra_coefficients, extra_coefficient_tensor, offset, mask)
    deviation = per_channel(rstd, statistic, exists, 1.0, ROWS)
    factor = per_channel(gamma, channel, exists, 1.0, ROWS)
    upstream = number(scale, scale_tensor) * load(dz, offset, mask)
    if bits is not None:
        place, byte_line, byte = mask_places(first_line, first_column, lines, length, LINES, LENGTH)
        bytes = tl.load(bits + place, mask=byte_line[:, None] & byte[None, :], other=0)
        dy = masked(upstream, unpack_signs(bytes, LINES, LENGTH) <= 0, ACTIVATION)
        own = factor * deviation * dy
    elif u is None:
        own = factor * deviation * upstream
    else:
        shift = per_channel(bias, channel, exists, -0.0, ROWS)
        value = combine((u,), (1.0,), None, shift, offset, mask, STAGE)
        centre = per_channel(mean, statistic, exists, 0.0, ROWS)
        xhat = normalized(value.to(tl.float32), centre, deviation)
        y = affine(xhat, factor, per_channel(beta, channel, exists, 0.0, ROWS))
        dy = activation_backward(upstream, y, ACTIVATION)
        if sum_dy is None:
            own = factor * deviation * dy
        else:
            m = number(count, count_tensor)
            mean_dy = per_channel(sum_dy, statistic, exists, 0.0, ROWS) / m
            mean_dy_xhat = per_channel(sum_dy_xhat, statistic, exists, 0.0, ROWS) / m
            if not PER_SAMPLE:
                mean_dy, mean_dy_xhat = factor * mean_dy, factor * mean_dy_xhat
            own = input_gradient(dy, xhat, deviation, factor, mean_dy, mean_dy_xhat)
    if len(extras) > 0:
        own += later
    store(du, offset, own, mask)
