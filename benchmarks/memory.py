"""What a forward pass keeps for its backward pass, on a CPU: `python -m benchmarks.memory [--out DIR]`.

A chain and a network of plain layers, and of fused ones. "train" is a forward pass of training, "input-gradient" one of
an attack on the frozen network in evaluation mode. Writes memory.csv into the folder, and prints a table per case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import ssp_fused
from ssp_fused.models import sspnet_cifar
from ssp_fused.nn import SSPBlock, SSPStack

from . import results
from .hardware import machine
from .plain import plain_stack
from .training_steps import PlainNet

BENCHMARK = "memory"
BATCH = 128
FUSED = "fused-cpu"
DIRECTIONS = {"train": True, "input-gradient": False}  # and whether parameters are trained


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


@dataclass(frozen=True)
class _Case:
    """The same layers, plain and fused, and their input."""

    name: str
    shape: tuple[int, ...]
    builders: dict[str, Callable[[], nn.Module]]


def _cases() -> Iterator[_Case]:
    """A chain of the CIFAR network's first group, and the network."""
    blocks = {
        results.EAGER: lambda: plain_stack(16, "ssp33", 3),
        FUSED: lambda: SSPStack(*(SSPBlock(16, "ssp33") for _ in range(3))),
    }
    yield _Case(f"3 ssp33 blocks, {BATCH}x16x32x32 float32", (BATCH, 16, 32, 32), blocks)
    networks = {
        results.EAGER: lambda: PlainNet("ssp33", 2),
        FUSED: lambda: sspnet_cifar("ssp33", 2),
    }
    name = f"sspnet_cifar(ssp33, 2), {BATCH}x3x32x32 float32"
    yield _Case(name, (BATCH, 3, 32, 32), networks)


def _row(case: _Case, contender: str, direction: str) -> results.Row:
    training = DIRECTIONS[direction]
    module = case.builders[contender]().train(training).requires_grad_(training)
    x = torch.rand(case.shape, requires_grad=True)
    owners = [*module.parameters(), *module.buffers()]
    with ssp_fused.use_backend("cpu"):
        kept = kept_for_backward(lambda: module(x), owners, [x])
    return results.Row(
        benchmark=BENCHMARK,
        case=case.name,
        contender=contender,
        direction=direction,
        device="cpu",
        status=results.OK,
        kept_bytes=kept.activations,
        kept_parameter_bytes=kept.parameters,
        kept_input_bytes=kept.inputs,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder")
    options = parser.parse_args(argv)
    rows = []
    for case in _cases():
        for direction in DIRECTIONS:
            found = [_row(case, contender, direction) for contender in case.builders]
            print(results.table(found), end="\n\n")
            rows += found
    path = options.out / f"{BENCHMARK}.csv"
    results.write(path, rows, machine(torch.device("cpu")))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
