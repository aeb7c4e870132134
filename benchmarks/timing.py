"""Milliseconds of a call: clocks, warm-up, an order shuffled in every repeat, and quantiles."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import hardware

Call = Callable[[], object]


class Quantiles(NamedTuple):
    """Of a set of times, in ms."""

    p20: float
    median: float
    p80: float


def quantiles(times: Sequence[float]) -> Quantiles:
    """20%, 50% and 80% quantiles of two values or more, linear between neighbours."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


def interleaved(
    calls: Mapping[str, Sequence[Call]],
    clock: Callable[[Call], float],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    loops: bool = False,
) -> dict[str, list[float]]:
    """Time every contender once in each repeat, in an order shuffled anew.

    Args:
        calls: Each contender's call, once for each of its input buffers, which take turns.
        clock: Milliseconds of one call.
        repeats: Times taken per contender.
        warmup: Rounds before that.
        seed: Of the shuffling.
        loops: A call is timed after another of the same contender, as a step of a loop comes after a step: it finds
            its own memory again, not what a contender with other tensors left.
    """
    shuffle = random.Random(seed).shuffle
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(warmup + repeats):
        shuffle(names)
        for name in names:
            own = calls[name]
            if loops:
                own[repeat % len(own)]()
            elapsed = clock(own[repeat % len(own)])
            if repeat >= warmup:
                times[name].append(elapsed)
    return times


def clock_of(device: torch.device) -> Callable[[Call], float]:
    """The clock for work on ``device``: the host's around a synchronous call, or the device's own events."""
    return _device_ms if device.type == "cuda" else _host_ms


def _host_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _device_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(call: Call) -> Call:
    """The call as one replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> Call:
        graph.replay()
        return call  # its inputs are what the graph reads: they have to live as long

    return replay


def cold_buffers(inputs: Sequence[Tensor], device: torch.device) -> int:
    """How many sets of ``inputs`` have to take turns for none to be in the cache when its turn comes."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    return math.ceil(2 * hardware.last_level_cache(device) / max(size, 1)) + 1
