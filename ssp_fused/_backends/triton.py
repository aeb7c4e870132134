"""The Triton kernels, for any NVIDIA GPU without a compiled library; for CPU tensors where Triton interprets them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._interface import Backend


class _TritonBackend(Backend):
    name = "triton"

    @property
    def ops(self) -> Any:
        return torch.ops.ssp_fused_triton

    def unavailable(self) -> str | None:
        return _load()

    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        reason = _load()
        if reason is not None:
            return reason
        served = _device_type()
        for tensor in tensors:
            if tensor.device.type != served:
                return f"it serves {served} tensors, got one on {tensor.device}"
            if tensor.dtype == torch.float64:
                return "it has no float64 kernels"
        return None


_loaded: dict[str, str | None] = {}


@torch.compiler.assume_constant_result
def _load() -> str | None:
    """Register the kernels, once; None if they are usable, else the reason why they are not."""
    if "reason" not in _loaded:
        _loaded["reason"] = _try_to_load()
    return _loaded["reason"]


def _try_to_load() -> str | None:
    try:
        importlib.import_module("ssp_fused._triton.ops")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if _device_type() == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@torch.compiler.assume_constant_result
def _device_type() -> str:
    """The type of the devices whose tensors the kernels take."""
    from .._triton.ops import INTERPRETED

    return "cpu" if INTERPRETED else "cuda"


BACKEND = _TritonBackend()
