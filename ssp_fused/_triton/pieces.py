"""What the kernels share: the arithmetic of ``reference``, places of tiles, per-channel vectors, mask bits.

A kernel sees an activation as dense matrices ``[samples, lines, length]``: in rows a line holds the channels of one
position, in planes it holds one channel of one sample. Lengths come as ``units * UNIT``, UNIT a constant: so the
compiler knows how far lines are aligned. Places of tiles are 64-bit, places within a tile 32-bit.
"""

import triton
import triton.language as tl

from .._ops import ACTIVATIONS, LEAKY_RELU_SLOPE

_RELU = tl.constexpr(ACTIVATIONS.index("relu"))
_LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
_SILU = tl.constexpr(ACTIVATIONS.index("silu"))
_SLOPE = tl.constexpr(LEAKY_RELU_SLOPE)


# --- arithmetic -------------------------------------------------------------------------------------------------


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """reference.activate."""
    if ACTIVATION == _RELU:
        return tl.where(y <= 0, 0.0, y)
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(y <= 0, _SLOPE * y, y)
    elif ACTIVATION == _SILU:
        return y / (1.0 + tl.exp(-y))
    else:
        return y


@triton.jit
def masked(dz, zero, ACTIVATION: tl.constexpr):
    """reference.masked, from ``zero = y <= 0``: selected, not multiplied, because inf * 0 is NaN."""
    if ACTIVATION == _RELU:
        return tl.where(zero, 0.0, dz)
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(zero, _SLOPE * dz, dz)
    else:
        return dz


@triton.jit
def activation_backward(dz, y, ACTIVATION: tl.constexpr):
    """reference.activation_backward: dz * act'(y)."""
    if ACTIVATION == _SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-y))
        return dz * (sigmoid * (1.0 + y * (1.0 - sigmoid)))
    else:
        return masked(dz, y <= 0, ACTIVATION)


@triton.jit
def normalized(u, mean, rstd):
    """reference._xhat."""
    return (u - mean) * rstd


@triton.jit
def affine(xhat, gamma, beta):
    """reference._affine."""
    return xhat * gamma + beta


@triton.jit
def input_gradient(dy, xhat, rstd, gamma, mean_dy, mean_dy_xhat):
    """reference.group_norm_act_backward, and norm_act_backward with sums: there a channel is a group.

    The means are those of gamma dy and gamma dy xhat over the elements that share statistics.
    """
    return rstd * (gamma * dy - mean_dy - xhat * mean_dy_xhat)


@triton.jit
def reciprocal_deviation(variance, eps):
    """(variance + eps)^(-1/2), correctly rounded at each step."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


# --- operands ---------------------------------------------------------------------------------------------------


@triton.jit
def number(value, tensor):
    """The number that stands in ``tensor``, where there is one, else ``value``."""
    if tensor is None:
        return value
    else:
        return tl.load(tensor).to(tl.float32)


@triton.jit
def load(pointer, offset, mask):
    """Every load is brought to float32 before any arithmetic; what lies outside reads as 0."""
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, offset, value, mask):
    """Round once, to the result's dtype."""
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def across(vector, ROWS: tl.constexpr):
    """A vector over channels, shaped to broadcast against a tile."""
    if ROWS:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def per_channel(pointer, index, mask, default, ROWS: tl.constexpr):
    """reference._per_channel."""
    if pointer is None:
        return default
    else:
        return across(load(pointer, index, mask), ROWS)


@triton.jit
def coefficient(numbers, tensor, K: tl.constexpr):
    """The k-th of the numbers, or of those that ``tensor`` holds, where there is one."""
    if tensor is None:
        return numbers[K]
    else:
        return tl.load(tensor + K).to(tl.float32)


@triton.jit
def weighted_sum(terms, coefficients, coefficient_tensor, offset, mask):
    """reference._weighted_sum."""
    total = coefficient(coefficients, coefficient_tensor, 0) * load(terms[0], offset, mask)
    for k in tl.static_range(1, len(terms)):
        total = total + coefficient(coefficients, coefficient_tensor, k) * load(
            terms[k], offset, mask
        )
    return total


@triton.jit
def combine(terms, coefficients, coefficient_tensor, bias, offset, mask, STAGE: tl.constexpr):
    """reference.combine: the stage, rounded to its dtype STAGE; ``bias`` is shaped like a tile."""
    u = weighted_sum(terms, coefficients, coefficient_tensor, offset, mask) + bias
    return u.to(STAGE)


# --- places -----------------------------------------------------------------------------------------------------


@triton.jit
def tile_corner(lines, length, LINES: tl.constexpr, LENGTH: tl.constexpr):
    """The sample, first line and first column of this program's tile, where every tile is a program's."""
    pid = tl.program_id(0)
    columns = tl.cdiv(length, LENGTH)
    blocks = tl.cdiv(lines, LINES)
    first_column = (pid % columns).to(tl.int64) * LENGTH
    first_line = (pid // columns % blocks).to(tl.int64) * LINES
    return (pid // columns // blocks).to(tl.int64), first_line, first_column


@triton.jit
def tile_places(
    sample, first_line, first_column, lines, length, LINES: tl.constexpr, LENGTH: tl.constexpr
):
    """Offsets of a tile's elements in the tensor, and which of its lines and columns exist."""
    line, column = tl.arange(0, LINES), tl.arange(0, LENGTH)
    base = (sample * lines + first_line) * length + first_column
    offset = base + (line[:, None] * length + column[None, :])
    return offset, line < lines - first_line, column < length - first_column


@triton.jit
def channels_of_tile(
    first_line,
    first_column,
    channels,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The channel of each column (rows) or line (planes)."""
    if ROWS:
        return first_column + tl.arange(0, LENGTH)
    else:
        return ((first_line % channels).to(tl.int32) + tl.arange(0, LINES)) % channels


@triton.jit
def statistics_of_tile(
    sample,
    first_line,
    first_column,
    channels,
    per_group,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Where each column's (rows) or line's (planes) statistics are in a table ``[N, num_groups]``."""
    if ROWS:
        return (sample * channels + first_column + tl.arange(0, LENGTH)) // per_group
    else:
        rest = (first_line % per_group).to(tl.int32)
        return first_line // per_group + (rest + tl.arange(0, LINES)) // per_group


@triton.jit
def tile(
    lines,
    length,
    channels,
    per_group,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    """This program's tile, where every tile is a program's; PER_SAMPLE: statistics are tables ``[N, num_groups]``.

    Returns:
        the first line and column; the elements' offsets in the tensor, and which exist; the channel of each column
        (rows) or line (planes), where its statistics are, and which exist.
    """
    sample, first_line, first_column = tile_corner(lines, length, LINES, LENGTH)
    offset, line, column = tile_places(
        sample, first_line, first_column, lines, length, LINES, LENGTH
    )
    mask = line[:, None] & column[None, :]
    exists = column if ROWS else line
    channel = channels_of_tile(first_line, first_column, channels, LINES, LENGTH, ROWS)
    if PER_SAMPLE:
        statistic = statistics_of_tile(
            sample, first_line, first_column, channels, per_group, LINES, LENGTH, ROWS
        )
    else:
        statistic = channel
    return first_line, first_column, offset, mask, channel, statistic, exists


@triton.jit
def sweep_corner(
    batch,
    lines,
    length,
    splits,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """This program's share of a sum over all but the channels: a tile that moves on in equal steps.

    In rows it moves down the lines of a sample (or of all, as one), in planes from sample to sample of a batch.

    Returns:
        the sample, or batch; the first step (the next is ``splits`` later) and the number of all steps; the offset
        of step 0 and the distance of two; the first line and column; the share's slot, and the number of slots.
    """
    pid = tl.program_id(0)
    columns = tl.cdiv(length, LENGTH)
    first_column = pid % columns * LENGTH
    rest = pid // columns
    if ROWS:
        split, sample = rest % splits, (rest // splits).to(tl.int64)
        base = sample * lines * length + first_column
        stride = LINES * length.to(tl.int64)
        return sample, split, tl.cdiv(lines, LINES), base, stride, 0, first_column, split, splits
    else:
        blocks = tl.cdiv(lines, LINES)
        first_line = rest % blocks * LINES
        rest = rest // blocks
        split, sample = rest % splits, (rest // splits).to(tl.int64)
        base = (sample * batch * lines + first_line) * length + first_column
        stride = lines * length.to(tl.int64)
        slot = split * columns + pid % columns
        return sample, split, batch, base, stride, first_line, first_column, slot, splits * columns


@triton.jit
def channels_of_sweep(
    first_line,
    first_column,
    lines,
    length,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The channel of each column (rows) or line (planes) of a sweep's tile, and which of them exist."""
    if ROWS:
        channel = first_column + tl.arange(0, LENGTH)
        return channel, channel < length
    else:
        channel = first_line + tl.arange(0, LINES)
        return channel, channel < lines


@triton.jit
def sweep_mask(
    step,
    first_line,
    first_column,
    lines,
    length,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which lines and columns of a sweep's tile exist at this step."""
    column = tl.arange(0, LENGTH) < length - first_column
    if ROWS:
        return step * LINES + tl.arange(0, LINES) < lines, column
    else:
        return first_line + tl.arange(0, LINES) < lines, column


# --- mask bits --------------------------------------------------------------------------------------------------


@triton.jit
def mask_places(first_line, first_column, lines, length, LINES: tl.constexpr, LENGTH: tl.constexpr):
    """Offsets of a tile's bytes ``[LINES, LENGTH / 8]`` in the mask of ``_layout.mask_shape``."""
    return tile_places(
        0, first_line, first_column // 8, lines, (length + 7) // 8, LINES, LENGTH // 8
    )


@triton.jit
def pack_bits(positive, LINES: tl.constexpr, LENGTH: tl.constexpr):
    """reference.pack_mask of a tile: its bytes ``[LINES, LENGTH / 8]``."""
    bits = tl.reshape(positive.to(tl.int32), (LINES, LENGTH // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)


@triton.jit
def unpack_signs(bytes, LINES: tl.constexpr, LENGTH: tl.constexpr):
    """reference.unpack_mask of a tile, as numbers of y's sign: 0.5 where y > 0, else -0.5.

    Tests of the bits themselves would take every predicate that there is, and loads that are predicated wait for one.
    """
    bits = (bytes[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (LINES, LENGTH)).to(tl.float32) - 0.5
