"""What a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Kept:
    """Bytes of the storages kept, each counted once.

    Attributes:
        activations: neither the model's nor the input's.
        parameters: of the model's parameters and buffers.
        inputs: of the input.
    """

    activations: int
    parameters: int
    inputs: int


def kept_for_backward(
    forward: Callable[[], Any], parameters: Iterable[Tensor], inputs: Iterable[Tensor]
) -> Kept:
    """Run ``forward`` once and add up the storages that autograd saves.

    Args:
        forward: Called once; its results are dropped.
        parameters: Tensors whose storages are counted apart.
        inputs: Likewise.
    """
    # Tensors, not addresses: what is dropped on the way would leave its address to the next one.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    totals = {"activations": 0, "parameters": 0, "inputs": 0}
    owners = {_address(t): "parameters" for t in parameters}
    owners |= {_address(t): "inputs" for t in inputs}
    for address, size in {_address(t): t.untyped_storage().nbytes() for t in saved}.items():
        totals[owners.get(address, "activations")] += size
    return Kept(**totals)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
