"""Which implementation of the ops serves a call: the choice, and its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from .._log import warn_once
from . import cpu, cuda, reference, triton
from ._interface import Backend

__all__ = ["Backend", "available_backends", "current", "select", "use_backend"]

_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (reference.BACKEND, cpu.BACKEND, triton.BACKEND, cuda.BACKEND)
}
# In the order in which "auto" tries them; the first that can serve the call does.
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# On a GPU Triton's kernels are the faster ones, but it takes the host longer to launch them: from tensors of so many
# bytes on, that no longer shows (measured: docs/backends.md).
_LARGE_BYTES = 256 << 20
_NAMES = ("auto", *_BACKENDS)

_chosen: str | None = None


def available_backends() -> dict[str, str | None]:
    """What ``use_backend`` may choose here.

    Returns:
        Every backend's name, with None if it is usable here, else the reason why it is not.
    """
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


class use_backend:  # noqa: N801 - used like a function
    """Choose the backend of every following call; as a context manager, until the block ends.

    The choice is the process's, not the thread's: backward passes run on autograd's own threads. A backward pass
    uses what its forward pass used. The environment variable ``SSP_FUSED_BACKEND`` sets the initial choice.

    Args:
        name: "auto" (for each call the fastest backend that can serve it, plain PyTorch if none can), "reference",
            "cpu", "triton" or "cuda".

    Raises:
        ValueError: The name is unknown.
        RuntimeError: That backend is not usable here; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        self._previous = current()
        _chosen = _checked(name, "backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._previous


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"unknown {source} {name!r}; known: {', '.join(_NAMES)}")
    reason = None if name == "auto" else _BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source} {name!r} is not usable here: {reason}")
    return name


def current() -> str:
    """The name chosen last by ``use_backend``, by the environment before that, "auto" by default."""
    global _chosen
    if _chosen is None:
        _chosen = _checked(os.environ.get("SSP_FUSED_BACKEND", "auto"), "SSP_FUSED_BACKEND")
    return _chosen


def select(ops: Sequence[str], tensors: Sequence[Tensor]) -> Backend:
    """The backend for a call that needs all of ``ops`` on ``tensors`` (on one device).

    Raises:
        RuntimeError: The backend was named by the user and cannot serve the call; the message says why.
    """
    name = current()
    device = tensors[0].device.type
    if name != "auto":
        backend = _BACKENDS[name]
        reason = backend.refusal(ops, tensors) or _transform_refusal(backend)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
        return backend
    reasons = []
    for candidate in _order(tensors[0]):
        backend = _BACKENDS[candidate]
        reason = backend.refusal(ops, tensors)
        if reason is None:
            reason = _transform_refusal(backend)
            if reason is not None:
                raise RuntimeError(reason)
            return backend
        reasons.append(f"{candidate}: {reason}")
    # Leaving the fused path is no error under "auto", but it is no secret either.
    why = "; ".join(reasons) or f"no backend has kernels for {device} tensors"
    warn_once(f"{device} tensors are left to plain PyTorch: {why}")
    return reference.BACKEND


def _order(tensor: Tensor) -> tuple[str, ...]:
    """The backends that "auto" tries for a call on such a tensor."""
    order = _AUTO.get(tensor.device.type, ())
    if tensor.device.type == "cuda" and tensor.numel() * tensor.element_size() >= _LARGE_BYTES:
        return order[::-1]
    return order


def _transform_refusal(backend: Backend) -> str | None:
    if backend is reference.BACKEND or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return (
        "torch.func transforms (grad, vmap, jvp, ...) see through no fused op; "
        "run them under ssp_fused.use_backend('reference')"
    )
