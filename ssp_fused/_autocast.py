"""Autocast: the dtype it asks of a convolution's input, and a region without it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._layout import stage_dtype


def convolution_dtype(terms: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the next convolution's input: under autocast, the one it would be cast to."""
    dtype = stage_dtype(terms)
    return (
        torch.get_autocast_dtype(terms[0].device.type) if casts(terms[0].device, dtype) else dtype
    )


def casts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether autocast is on, and applies to tensors of ``dtype``."""
    return torch.is_autocast_enabled(device.type) and dtype != torch.float64


def disabled(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A region in which autocast is off, on the device of ``like``."""
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
