"""How the benchmarks time: quantiles, order, cold inputs. Times themselves are not judged."""

import dataclasses
import itertools
import time

import pytest
import torch
from benchmark_cases import CPU, FEW

from benchmarks import contenders, hardware, harness, timing


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.quantiles(range(101)) == (20, 50, 80)
    assert timing.quantiles([2.0, 1.0]).median == 1.5


def test_every_repeat_has_its_own_order():
    def run(seed):
        log = []
        calls = {
            name: [lambda n=name, b=b: log.append((n, b)) for b in range(2)] for name in "abcd"
        }

        def clock(call):
            call()
            return float(len(log))

        times = timing.interleaved(calls, clock, repeats=6, warmup=2, seed=seed)
        return log, times

    log, times = run(0)
    rounds = [log[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(name for name, _ in order) == list("abcd") for order in rounds)
    assert len({tuple(name for name, _ in order) for order in rounds}) > 4
    assert [{b for _, b in order} for order in rounds] == [{0}, {1}] * 4
    assert all(len(own) == 6 for own in times.values())
    assert min(itertools.chain(*times.values())) == 9  # the two rounds of warming up are not in it
    assert run(0)[0] == log and run(1)[0] != log


def test_steps_of_loops_are_timed_after_their_own():
    log = []
    calls = {name: [lambda n=name: log.append(n)] for name in "abc"}

    def clock(call):
        log.append("timed")
        call()
        return 0.0

    timing.interleaved(calls, clock, repeats=3, warmup=1, seed=0, loops=True)
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(turns) == 4 * 3
    assert all(before == name and mark == "timed" for before, mark, name in turns)


def test_cold_inputs_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(hardware, "last_level_cache", lambda device: 1 << 20)
    inputs = [torch.zeros(1 << 16), torch.zeros(1 << 16)]
    assert timing.cold_buffers(inputs, CPU) == 5
    seen = []
    work = harness.Work(seen.append, lambda index: [torch.full((1 << 18,), float(index))])
    task = harness.Task("test", "c", "d", CPU, None, [harness.Contender("one", lambda: work)])
    (row,) = harness.measure(task, harness.Settings(repeats=4, warmup=0, cold=True))
    assert [t[0].item() for t in seen] == [0, 1, 2, 0] and row.gb_per_s is None
    seen.clear()
    harness.measure(task, FEW)
    assert [t[0].item() for t in seen] == [0, 0]
    assert hardware.last_level_cache(CPU) > 0


def test_settings_that_cannot_be():
    task = harness.Task("test", "c", "d", CPU, 1, [])
    with pytest.raises(ValueError, match="graph needs a cuda device, got cpu"):
        harness.measure(task, harness.Settings(graph=True))
    twice = [harness.Contender("a", lambda: None)] * 2
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        harness.measure(dataclasses.replace(task, contenders=twice), FEW)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_gpu_waits_for_the_host_where_launching_is_not_timed(monkeypatch, ahead):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("end")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait"))
    clock = timing.clock_of(torch.device("cuda"), ahead=ahead)
    assert clock(lambda: log.append("call")) == 2.0
    assert log == ["idle", *["wait"] * ahead, "event", "call", "event", "end"]


def test_graphs_of_all_but_what_must_not_be_captured(monkeypatch):
    cuda, log = torch.device("cuda"), []

    def clock_of(device, *, ahead):
        log.append((device, ahead))
        return lambda call: float(call() or 1)

    monkeypatch.setattr(timing, "clock_of", clock_of)
    monkeypatch.setattr(timing, "captured", lambda call: lambda: 2)
    monkeypatch.setattr(timing, "warm_up", log.append)

    def contender(name, **values):
        work = harness.Work(lambda: None, lambda index: (), peak=lambda: 0, **values)
        return harness.Contender(name, lambda: work)

    entrants = [contender("one"), contender("copy", capturable=False)]
    task = harness.Task("test", "c", "d", cuda, None, entrants)
    for graph, times in ((True, [2, 1]), (False, [1, 1])):
        rows = harness.measure(task, dataclasses.replace(FEW, graph=graph))
        assert [row.median_ms for row in rows] == times
    assert log == [cuda, (cuda, True), cuda, (cuda, False)]
    assert not contenders.copy_of(8, CPU).capturable


def test_only_a_gpu_is_warmed_up():
    start = time.perf_counter()
    timing.warm_up(CPU)
    assert time.perf_counter() - start < timing._WARM_UP_S
