"""The CUDA C++ kernels."""

from __future__ import annotations

import torch

from ._interface import CompiledBackend


class _CudaBackend(CompiledBackend):
    def unavailable(self) -> str | None:
        reason = super().unavailable()
        if reason is None and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return reason


BACKEND = _CudaBackend("cuda", library="cuda", device="cuda")
