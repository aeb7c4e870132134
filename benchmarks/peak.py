"""The most memory that a call has in tensors at a time, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


def peak_cpu_bytes(call: Callable[[], object]) -> int:
    """Run ``call`` once; allocations and releases of CPU tensors are added up in their order.

    Memory that a library takes from elsewhere, for its own work, is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == _MEMORY_EVENT]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            level += event.nbytes()
            peak = max(peak, level)
    return peak
