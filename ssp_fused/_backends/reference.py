"""Plain PyTorch, for any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ._interface import Backend


class _ReferenceBackend(Backend):
    name = "reference"

    @property
    def ops(self) -> Any:
        return reference

    def unavailable(self) -> str | None:
        return None

    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        return None


BACKEND = _ReferenceBackend()
