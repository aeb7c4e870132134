"""Milliseconds of a call: clocks, warm-up, an order shuffled in every repeat, and quantiles."""

from __future__ import annotations

import functools
import gc
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

# Some 2 ms in which the device waits and the host runs ahead: a compiled step that replays graphs of its own takes the
# host one.
_HEAD_START_CYCLES = 4_000_000
# A GPU's clocks are up after some 0.3 s of work.
_WARM_UP_S = 0.5


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


def clock_of(device: torch.device, *, ahead: bool = False) -> Callable[[Call], float]:
    """The clock for work on ``device``: the host's around a synchronous call, or the device's own events.

    Args:
        device: Where the work is.
        ahead: Let a GPU wait until the host has queued the work, which shall not be measured.
    """
    return functools.partial(_device_ms, ahead=ahead) if device.type == "cuda" else _host_ms


@functools.cache
def warm_up(device: torch.device) -> None:
    """Let a GPU compute until its clocks are up, once in a process."""
    if device.type != "cuda":
        return
    matrix = torch.ones(4096, 4096, device=device)
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_S:
        matrix @ matrix
        torch.cuda.synchronize(device)


def _host_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _device_ms(call: Call, *, ahead: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        # While the device waits the host queues all that follows: the events enclose the device's work, and not the
        # launching of it, which can take the host longer than the device its work.
        torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(call: Call) -> Call:
    """The call as one replay of a CUDA graph."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    # As long as an autograd graph is alive, be it in a cycle, its parameters keep the nodes that take their gradients,
    # and these the stream they were made on: a captured backward pass would wait for it, which breaks the capture.
    gc.collect()
    try:
        graph = _capture(call)
    except RuntimeError:
        # The first backward pass that a process captures was seen to fail, and every other to work.
        graph = _capture(call)

    def replay() -> Call:
        graph.replay()
        return call  # its inputs are what the graph reads: they have to live as long

    return replay


def _capture(call: Call) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Autograd's threads may do what a capture forbids its own thread, such as making a library's handle.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph


def cold_buffers(inputs: Sequence[Tensor], device: torch.device) -> int:
    """How many sets of ``inputs`` have to take turns for none to be in the cache when its turn comes."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    return math.ceil(2 * hardware.last_level_cache(device) / max(size, 1)) + 1
