"""Contenders checked, then timed against each other: the part of every benchmark that does not know what it measures.

A benchmark makes a :class:`Task` of each case and direction. :func:`measure` builds every contender, checks it against
the fp64 reference, and times those that are right; one that is wrong or cannot run gets a row that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import timing
from .memory import Kept
from .results import CANNOT_RUN, OK, WRONG, Row, with_ratios

MIN_REPEATS = 30


class CannotRunError(RuntimeError):
    """A contender cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Work:
    """A contender that was built.

    Attributes:
        run: What is timed: one call on one set of inputs. On a GPU it does not wait for the device.
        inputs: The i-th set of inputs.
        check: Compares the contender with the fp64 reference and says how; raises AssertionError where it is wrong.
            None where it computes something else by design.
        kept: Measures what it keeps for backward, where that means something.
        peak: Measures the most memory it has at a time, in place of the device's own count, which CPUs lack.
        capturable: Whether it is captured where CUDA graphs are replayed; launched as it is otherwise.
    """

    run: Callable[..., object]
    inputs: Callable[[int], Sequence[Tensor]]
    check: Callable[[], str] | None = None
    kept: Callable[[], Kept] | None = None
    peak: Callable[[], int] | None = None
    capturable: bool = True


@dataclass(frozen=True)
class Contender:
    """A name and how to build it.

    Attributes:
        build: Raises :class:`CannotRunError` with the reason where it cannot run here.
    """

    name: str
    build: Callable[[], Work]


@dataclass(frozen=True)
class Task:
    """Contenders for the same work.

    Attributes:
        bytes: Logical bytes of the work (``traffic``), None where they mean nothing.
    """

    benchmark: str
    case: str
    direction: str
    device: torch.device
    bytes: int | None
    contenders: Sequence[Contender]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: Times taken per contender.
        warmup: Calls before that.
        seed: Of the order in each repeat.
        cold: Inputs take turns, so many that none is in the last-level cache.
        graph: Replay CUDA graphs in place of launching kernels, and measure the device's time alone.
        loops: A call is timed after another of the same contender.
    """

    repeats: int = MIN_REPEATS
    warmup: int = 3
    seed: int = 0
    cold: bool = False
    graph: bool = False
    loops: bool = False


@dataclass
class _Entry:
    """A contender on its way to a row."""

    row: Row
    calls: list[timing.Call] = field(default_factory=list)


def measure(task: Task, settings: Settings) -> list[Row]:
    """A row for every contender of the task, in their order.

    Raises:
        ValueError: CUDA graphs are asked for on another device; two contenders have one name.
    """
    if settings.graph and task.device.type != "cuda":
        raise ValueError(f"graph needs a cuda device, got {task.device}")
    names = [contender.name for contender in task.contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have different names, got {names}")
    entries = [_prepare(task, contender, settings) for contender in task.contenders]
    timing.warm_up(task.device)
    times = timing.interleaved(
        {entry.row.contender: entry.calls for entry in entries if entry.calls},
        timing.clock_of(task.device, ahead=settings.graph),
        repeats=settings.repeats,
        warmup=settings.warmup,
        seed=settings.seed,
        loops=settings.loops,
    )
    rows = [_timed(entry.row, times.get(entry.row.contender)) for entry in entries]
    return with_ratios(rows)


def _prepare(task: Task, contender: Contender, settings: Settings) -> _Entry:
    """Build and check; no calls where it must not be timed."""
    row = Row(
        benchmark=task.benchmark,
        case=task.case,
        contender=contender.name,
        direction=task.direction,
        device=str(task.device),
        status=OK,
        bytes=task.bytes,
    )
    try:
        work = contender.build()
        checked = work.check() if work.check else ""
        row = dataclasses.replace(row, checked=checked, **_memory(work, task.device))
        return _Entry(row, _calls(work, task.device, settings))
    except AssertionError as error:
        status = f"{WRONG}: {_first_line(error)}"
    except CannotRunError as error:
        status = f"{CANNOT_RUN}: {error}"
    except Exception as error:  # of another's code: reported, and the others are still measured
        status = f"{CANNOT_RUN}: {type(error).__name__}: {_first_line(error)}"
    return _Entry(dataclasses.replace(row, status=status))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _memory(work: Work, device: torch.device) -> dict[str, int]:
    found = {}
    if work.kept is not None:
        kept = work.kept()
        found["kept_bytes"] = kept.activations
        found["kept_parameter_bytes"] = kept.parameters
        found["kept_input_bytes"] = kept.inputs
    if work.peak is not None:
        found["peak_bytes"] = work.peak()
    elif device.type == "cuda":
        inputs = work.inputs(0)
        work.run(*inputs)  # workspaces that stay are not the call's
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run(*inputs)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return found


def _calls(work: Work, device: torch.device, settings: Settings) -> list[timing.Call]:
    first = work.inputs(0)
    count = 1
    if settings.cold:
        turns = settings.warmup + settings.repeats
        count = min(timing.cold_buffers(first, device), turns)
    calls = []
    for index in range(count):
        call = _bound(work.run, work.inputs(index) if index else first)
        if settings.graph and work.capturable:
            try:
                call = timing.captured(call)
            except RuntimeError as error:
                reason = f"no CUDA graph of it can be captured: {_first_line(error)}"
                raise CannotRunError(reason) from error
        calls.append(call)
    return calls


def _bound(run: Callable[..., object], inputs: Sequence[Tensor]) -> timing.Call:
    return lambda: run(*inputs)


def _timed(row: Row, times: Sequence[float] | None) -> Row:
    if times is None:
        return row
    spread = timing.quantiles(times)
    return dataclasses.replace(
        row,
        repeats=len(times),
        p20_ms=spread.p20,
        median_ms=spread.median,
        p80_ms=spread.p80,
        gb_per_s=None if row.bytes is None else row.bytes / spread.median / 1e6,
    )
