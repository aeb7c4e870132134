"""The place of the Triton kernels, which this version does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._interface import Backend

_REASON = "this version has no Triton kernels"


class _TritonBackend(Backend):
    name = "triton"

    @property
    def ops(self) -> Any:
        raise RuntimeError(_REASON)

    def unavailable(self) -> str | None:
        return _REASON

    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        return _REASON


BACKEND = _TritonBackend()
