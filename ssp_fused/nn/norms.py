"""Normalization modules by name."""

from __future__ import annotations

import torch
from torch import nn

NORMS = ("batch", "group", "instance")


def make_norm(
    norm: str,
    channels: int,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A normalization module of torch's.

    Args:
        norm: "batch", "group" or "instance", which is group norm with a group a channel.
        channels: Of the input ``[N, channels, H, W]``.
        num_groups: For "group"; default min(32, channels).
        eps: Added to the variance.
        momentum: Of batch norm's running statistics; None averages all batches.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An unknown norm; ``num_groups`` without "group", or no divisor of the channels.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")
    if num_groups is not None and norm != "group":
        raise ValueError(f"num_groups must be None for norm {norm!r}, got {num_groups}")
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=eps, momentum=momentum, device=device, dtype=dtype)
    groups = channels if norm == "instance" else num_groups or min(32, channels)
    return nn.GroupNorm(groups, channels, eps=eps, device=device, dtype=dtype)
