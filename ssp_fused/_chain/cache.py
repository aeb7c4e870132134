"""The size of the cache that all cores of a device share."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN = 8 * 2**20
_UNITS = {"K": 2**10, "M": 2**20}


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache of a CPU or the L2 cache of a GPU; 8 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=_UNKNOWN)
