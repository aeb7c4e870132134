"""Normalize and activate: reference.stage_norm_act."""

import triton
import triton.language as tl

from .pieces import (
    activate,
    affine,
    combine,
    mask_places,
    normalized,
    pack_bits,
    per_channel,
    store,
    tile,
)


@triton.jit(do_not_specialize=["lines", "units", "channels", "per_group"])
def normalize_kernel(
    terms,
    coefficients,
    coefficient_tensor,
    bias,
    mean,
    rstd,
    gamma,
    beta,
    u,
    z,
    bits,
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
    """reference.stage_norm_act; PER_SAMPLE: with statistics ``[N, num_groups]``, as stage_group_norm_act."""
    length = units * UNIT
    first_line, first_column, offset, mask, channel, statistic, exists = tile(
        lines, length, channels, per_group, LINES, LENGTH, ROWS, PER_SAMPLE
    )
    shift = per_channel(bias, channel, exists, -0.0, ROWS)
    value = combine(terms, coefficients, coefficient_tensor, shift, offset, mask, STAGE)
    if u is not None:
        store(u, offset, value, mask)
    xhat = normalized(
        value.to(tl.float32),
        per_channel(mean, statistic, exists, 0.0, ROWS),
        per_channel(rstd, statistic, exists, 1.0, ROWS),
    )
    y = affine(
        xhat,
        per_channel(gamma, channel, exists, 1.0, ROWS),
        per_channel(beta, channel, exists, 0.0, ROWS),
    )
    store(z, offset, activate(y, ACTIVATION), mask)
    if bits is not None:
        place, byte_line, byte = mask_places(first_line, first_column, lines, length, LINES, LENGTH)
        positive = (y <= 0).to(tl.int1) == 0
        packed = pack_bits(positive & mask, LINES, LENGTH)
        store(bits, place, packed, byte_line[:, None] & byte[None, :])
