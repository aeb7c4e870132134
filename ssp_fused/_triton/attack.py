"""Attack steps: reference.linf_step and l2_step."""

import triton
import triton.language as tl

from .pieces import load, store


@triton.jit
def _clamp(value, low, high):
    """torch.clamp: NaN if any of the three is NaN."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["step_size", "eps", "low", "high", "units"])
def linf_kernel(
    x_adv,
    grad,
    x,
    result,
    step_size,
    eps,
    low,
    high,
    units,
    UNIT: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """reference.linf_step. sign(0) and sign(NaN) are 0, as in torch.sign."""
    offset = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    mask = offset < units.to(tl.int64) * UNIT
    g = load(grad, offset, mask)
    centre = load(x, offset, mask)
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    moved = load(x_adv, offset, mask) + step_size * sign
    moved = _clamp(moved, centre - eps, centre + eps)
    store(result, offset, _clamp(moved, low, high), mask)


@triton.jit(do_not_specialize=["step_size", "eps", "low", "high", "units"])
def l2_kernel(
    x_adv,
    grad,
    x,
    result,
    step_size,
    eps,
    low,
    high,
    units,
    UNIT: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """reference.l2_step: a program takes a sample, over which it passes three times."""
    length = units.to(tl.int64) * UNIT
    base = tl.program_id(0).to(tl.int64) * length
    place = tl.arange(0, 2 * LENGTH)  # an operand alone: more of it at once
    squares = tl.zeros((2 * LENGTH,), tl.float32)
    for first in range(0, length, 2 * LENGTH):
        g = load(grad, base + first + place, place < length - first)
        squares += g * g
    norm = tl.sqrt_rn(tl.sum(squares, 0))

    place = tl.arange(0, LENGTH)
    squares = tl.zeros((LENGTH,), tl.float32)
    for first in range(0, length, LENGTH):
        offset, mask = base + first + place, place < length - first
        delta = _displacement(x_adv, grad, load(x, offset, mask), step_size, norm, offset, mask)
        squares += delta * delta
    distance = tl.sqrt_rn(tl.sum(squares, 0))

    shrink = tl.where(distance > eps, tl.div_rn(eps, distance), 1.0)
    for first in range(0, length, LENGTH):
        offset, mask = base + first + place, place < length - first
        centre = load(x, offset, mask)
        delta = _displacement(x_adv, grad, centre, step_size, norm, offset, mask)
        store(result, offset, _clamp(centre + delta * shrink, low, high), mask)


@triton.jit
def _displacement(x_adv, grad, centre, step_size, norm, offset, mask):
    """The distance from x after the step; a zero (or NaN) gradient moves nothing.

    The quotient may be off by two units in the last place: correctly rounded it is a call, and loads wait for it.
    """
    direction = tl.where(norm > 0, load(grad, offset, mask) / norm, 0.0)
    return load(x_adv, offset, mask) + step_size * direction - centre
