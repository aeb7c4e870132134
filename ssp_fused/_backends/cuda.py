"""The CUDA C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._interface import CompiledBackend

# The kernels compute in float32; this one alone in float64 too.
_FLOAT64_OPS = {"linf_step"}


class _CudaBackend(CompiledBackend):
    def unavailable(self) -> str | None:
        reason = super().unavailable()
        if reason is None and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return reason

    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        reason = super().refusal(ops, tensors)
        if reason is not None or all(tensor.dtype != torch.float64 for tensor in tensors):
            return reason
        narrow = [op for op in ops if op not in _FLOAT64_OPS]
        return f"its {', '.join(narrow)} take no float64 tensors" if narrow else None


BACKEND = _CudaBackend("cuda", library="cuda", device="cuda")
