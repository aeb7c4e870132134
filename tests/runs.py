"""Small runs that are stopped at a batch, and the comparison of two runs."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssp_fused.adversarial import TrainConfig, TrainingInterrupted
from ssp_fused.adversarial import run as run_module

TIMES = ("seconds", "images_per_second")
BATCHES = 4


def config(out: Path, **changes: Any) -> TrainConfig:
    small = {"blocks": 1, "width": 4, "epochs": 3, "batch_size": 32, "limit": 128, "steps": 1}
    return TrainConfig(
        **{"device": "cpu", "augment": "crop-flip", "out": str(out), **small, **changes}
    )


def raise_at(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> None:
    """Call `action` while the batch `count` (from 1, over all epochs of the process) is trained on."""
    calls = 0
    original = run_module.train_epoch

    def train_epoch(model: nn.Module, batches: Any, optimizer: Any, loss: Any, **options: Any):
        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                action()
            return loss(*arguments)

        return original(model, batches, optimizer, counted, **options)

    monkeypatch.setattr(run_module, "train_epoch", train_epoch)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Processes that were started in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stopped_at(count: int, start: Callable[[], Any]) -> str:
    """What the interrupt of `start` at a batch says."""
    with heeding_ctrl_c(), pytest.MonkeyPatch.context() as monkeypatch:
        raise_at(monkeypatch, count, ctrl_c)
        with pytest.raises(TrainingInterrupted) as caught:
            start()
    return str(caught.value)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in (*TIMES, "out")}
    return [without_times(item) for item in value] if isinstance(value, (list, tuple)) else value


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal through and through: types, keys in their order, and the bits of tensors."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in ("last.pt", "best.pt"):
        states = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        assert_same(*map(without_times, states), name)
    lines = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (found, expected)
    )
    assert_same(*map(without_times, lines), "metrics")
