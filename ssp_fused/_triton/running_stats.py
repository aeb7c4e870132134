"""Running statistics: reference.update_running_stats_."""

import triton
import triton.language as tl

from .pieces import load, number, store


@triton.jit(
    do_not_specialize=["mean_stride", "var_stride", "uses", "channels", "count", "momentum"]
)
def update_kernel(
    running_mean,
    running_var,
    tracked,
    means,
    variances,
    count,
    count_tensor,
    momentum,
    mean_stride,
    var_stride,
    uses,
    channels,
    CHANNELS: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """reference.update_running_stats_; AVERAGE stands for momentum None.

    There every program asks for the number of batches, and none may count them.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    m = number(count, count_tensor)
    correction = m / (m - 1.0)
    for use in range(uses):
        if AVERAGE:
            factor = 1.0 / (tl.load(tracked) + use + 1).to(tl.float32)
        else:
            factor = momentum
        if running_mean is not None:
            batch = load(means, use * channels + channel, exists)
            _blend(running_mean, channel * mean_stride, batch, factor, m, exists)
        if running_var is not None:
            batch = load(variances, use * channels + channel, exists) * correction
            _blend(running_var, channel * var_stride, batch, factor, m, exists)
    if tracked is not None and not AVERAGE:
        tl.store(tracked, tl.load(tracked) + uses, mask=tl.program_id(0) == 0)


@triton.jit
def _blend(running, offset, batch, factor, count, exists):
    """running = (1 - factor) running + factor batch; an empty batch leaves it as it is."""
    old = load(running, offset, exists)
    store(running, offset, tl.where(count > 0, (1.0 - factor) * old + factor * batch, old), exists)
