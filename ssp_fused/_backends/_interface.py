"""What every backend is: a name, its ops, and its reasons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_kernels: dict[tuple[str, str], bool] = {}


class Backend(ABC):
    """One implementation of the ops.

    Attributes:
        name: What ``use_backend`` calls it.
        ops: Has each op as an attribute, with the signature of ``_ops.SCHEMAS``.
        writes_over: Whether it also has those of ``_ops.OUT_SCHEMAS``.
    """

    name: str
    writes_over = False

    @property
    @abstractmethod
    def ops(self) -> Any:
        """The namespace of the ops."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """None if this backend is usable on this machine, else the reason why it is not."""

    @abstractmethod
    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        """None if this backend can serve a call of ``ops`` on ``tensors``, else the reason."""


class CompiledBackend(Backend):
    """Ops of a compiled library, registered with the dispatcher for one device type."""

    def __init__(self, name: str, library: str, device: str, *, writes_over: bool = False) -> None:
        self.name = name
        self.writes_over = writes_over
        self._library = library
        self._device = device

    @property
    def ops(self) -> Any:
        return torch.ops.ssp_fused

    def unavailable(self) -> str | None:
        from .. import _extension

        return _extension.load(self._library)

    def refusal(self, ops: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if tensor.device.type != self._device:
                return f"it serves {self._device} tensors, got one on {tensor.device}"
        reason = self.unavailable()
        if reason is not None:
            return reason
        missing = [op for op in ops if not _has_kernel(op, self._device.upper())]
        return f"it has no {', '.join(missing)}" if missing else None


@torch.compiler.assume_constant_result
def _has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the library, once loaded, implements the op; a constant, also where a compiler traces."""
    if (op, dispatch_key) not in _kernels:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        _kernels[op, dispatch_key] = registered(f"ssp_fused::{op}", dispatch_key)
    return _kernels[op, dispatch_key]
