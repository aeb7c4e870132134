"""What a forward pass keeps for its backward pass; README's table: `python -m benchmarks.memory`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import ssp_fused


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


def _chain() -> tuple[nn.Module, Tensor]:
    blocks = (ssp_fused.nn.SSPBlock(16, "ssp33") for _ in range(3))
    return ssp_fused.nn.SSPStack(*blocks), torch.randn(128, 16, 32, 32)


def _network() -> tuple[nn.Module, Tensor]:
    return ssp_fused.models.sspnet_cifar("ssp33", 2), torch.rand(32, 3, 32, 32)


def main() -> None:
    """Print the bytes kept by plain PyTorch and by the fused layers."""
    print("| fp32 | plain PyTorch | fused | ratio |\n|---|---|---|---|")
    for title, build in (
        ("three ssp33 blocks, 128x16x32x32", _chain),
        ("sspnet_cifar(ssp33, 2), 32 images", _network),
    ):
        for what, training in (("training step", True), ("attack step, frozen", False)):
            module, x = build()
            module.train(training).requires_grad_(training)
            x.requires_grad_()
            kept = []
            for backend in ("reference", "auto"):
                with ssp_fused.use_backend(backend):
                    forward = partial(module, x)
                    owners = [*module.parameters(), *module.buffers()]
                    kept.append(kept_for_backward(forward, owners, [x]).activations / 2**20)
            print(
                f"| {title}, {what} | {kept[0]:.1f} MiB | {kept[1]:.1f} MiB | {kept[1] / kept[0]:.3f} |"
            )


if __name__ == "__main__":
    main()
