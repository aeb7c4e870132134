"""Where a run computes, and with which implementation of the layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .._backends import use_backend


def checked_device(name: str | None) -> str:
    """The name of a usable device; None means a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device of torch") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not here, torch sees {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    return name


def chosen_backend(name: str | None) -> AbstractContextManager[object]:
    """A context with the named implementation of the layers; None leaves the choice alone."""
    return nullcontext() if name is None else use_backend(name)
