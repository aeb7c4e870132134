"""The processes of a run: who they are, what they tell each other, what torchrun says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .devices import checked_device


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one among them.

    What they tell each other goes through the default process group, which must serve CPU tensors
    (gloo, or "cpu:gloo,cuda:nccl"). All of them make the same calls in the same order.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default process group; this process alone, where there is none."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def part(self) -> tuple[int, int]:
        """The share of each batch that is this process's: which of how many."""
        return self.rank, self.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.sum(torch.tensor([float(flag)]))) if self.size > 1 else flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, fp64 on the CPU."""
        total = values.detach().to("cpu", torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's value by rank, in each process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        if not self.is_first:
            self.any(False)
        yield
        if self.is_first:
            self.any(False)

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers: running statistics of batches differ."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, where there are several processes.

        All of them get the first one's parameters and buffers. Later, buffers are left to
        `share_buffers`: exchanging them in each forward pass would change them between the two
        passes of TRADES and MART.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
        wrapped.broadcast_buffers = False
        return wrapped


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone, where it did not.

    The default process group is gloo on CPUs; on GPUs nccl, beside gloo for what is on the CPU. A
    process computes on the GPU of its number on the machine ("cuda" then means that one).

    Args:
        device: "cpu", "cuda", or None for a GPU if there is one.

    Yields:
        The processes. After the block the process group is left, unless an error ended it.

    Raises:
        ValueError: no such device; fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    place = torch.device(checked_device(device))
    backend = "gloo"
    if place.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(
                f"device: process {number} of this machine needs a GPU of its own, torch sees {count}"
            )
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    yield Ranks.current()
    # Not after an error: the others may wait for this process, and learn of its end only then.
    dist.destroy_process_group()
