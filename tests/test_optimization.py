"""Accumulated gradients, mixed precision, schedules, averages of weights, layouts, compilation."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import data, models
from ssp_fused.adversarial import (
    Precision,
    Ranks,
    TrainConfig,
    clean_loss,
    evaluate,
    fit,
    load_checkpoint,
    pgd_loss,
    train_epoch,
)
from ssp_fused.adversarial import state as state_module
from ssp_fused.adversarial.networks import network_spec
from ssp_fused.adversarial.state import TrainingState

ATTACK = {"eps": 0.1, "step_size": 0.05, "steps": 2, "random_start": False}
BATCHES = 3


def network(norm: str = "group") -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=8, in_channels=1, norm=norm)


def config(out: Path, **changes: Any) -> TrainConfig:
    small = {"blocks": 1, "width": 4, "epochs": 4, "batch_size": 32, "limit": 96, "steps": 1}
    return TrainConfig(**{"device": "cpu", "out": str(out), **small, **changes})


def states_of(monkeypatch: pytest.MonkeyPatch) -> list[TrainingState]:
    """The states of the runs to come."""
    found = []
    original = TrainingState.__init__

    def spy(self: TrainingState, *arguments: Any) -> None:
        original(self, *arguments)
        found.append(self)

    monkeypatch.setattr(TrainingState, "__init__", spy)
    return found


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    batches = [(x.double(), y) for x, y in data.load("digits").train.take(32).batches(16)]
    found = {}
    for accumulate in (1, parts):
        model = network().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = partial(pgd_loss, **ATTACK)
        result = train_epoch(model, batches, optimizer, loss, accumulate=accumulate)
        assert result.images == 32
        found[accumulate] = (result.loss, result.accuracy, dict(model.named_parameters()))
    torch.testing.assert_close(found[1], found[parts])


class Halves(nn.Module):
    """A network that notes the types of what it is given and what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.seen = network("batch"), set()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.seen.add((x.dtype, logits.dtype))
        return logits


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_trains_and_attacks_in_16_bits_with_images_in_fp32(name: str, dtype) -> None:
    model = Halves()
    x, y = next(data.load("digits").train.batches(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(name)
    full = clean_loss(network("batch").train(), x, y).loss
    result = train_epoch(model, [(x, y)], optimizer, clean_loss, precision=precision)
    assert result.loss == pytest.approx(full.item(), rel=0.02)
    train_epoch(model, [(x, y)], optimizer, partial(pgd_loss, **ATTACK), precision=precision)
    assert model.seen == {(torch.float32, dtype)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert precision.scaler.is_enabled() == (name == "fp16")


def test_a_step_with_gradients_that_are_not_finite_is_left_out() -> None:
    model = network()
    x, y = next(data.load("digits").train.batches(4))
    before = [p.detach().clone() for p in model.parameters()]
    precision = Precision("fp16")
    scale = precision.scaler.get_scale()

    def overflowing(*given: Any):
        loss, logits = clean_loss(*given)
        return type(clean_loss(*given))(loss * math.inf, logits)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_epoch(model, [(x, y)], optimizer, overflowing, precision=precision)
    assert all(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == scale / 2


def test_multistep_falls_to_a_tenth_after_its_epochs(tmp_path: Path) -> None:
    given = {"schedule": "multistep", "method": "none"}
    result = fit(config(tmp_path / "a", milestones=(1, 3), **given), progress=False)
    rates = [epoch["lr"] for epoch in result["epochs"]]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert config(tmp_path, epochs=200, **given).resolved().milestones == (80, 140, 180)
    saved = load_checkpoint(tmp_path / "a" / "last.pt")[1]
    assert saved.milestones == (1, 3)


def assert_weights(model: nn.Module, expected: list[Tensor]) -> None:
    for found, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), value)


def test_ema_is_the_exponential_average_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average: list[Tensor] = []
    original = TrainingState.end_step

    def spy(self: TrainingState) -> None:
        nonlocal average
        now = [p.detach().clone() for p in self.model.parameters()]
        average = [0.7 * a + 0.3 * p for a, p in zip(average, now, strict=True)] if average else now
        original(self)

    monkeypatch.setattr(TrainingState, "end_step", spy)
    (state,) = run_with_state(monkeypatch, config(tmp_path, average="ema", ema_decay=0.7, epochs=2))
    model, _, checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert_weights(model, average)
    # Running statistics are averaged alike: they are not those of the trained weights.
    norm = "block1.0.norm1.running_mean"
    assert not torch.equal(checkpoint["model"][norm], checkpoint["training"]["model"][norm])
    assert_weights(state.model, [checkpoint["training"]["model"][n] for n, _ in parameters(model)])
    # What was validated is what is kept.
    val = data.load("digits").val.take(100)
    assert checkpoint["metrics"]["val_clean"] == evaluate(model, val.batches(500))["clean"]


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def run_with_state(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> list[TrainingState]:
    states = states_of(monkeypatch)
    fit(config, progress=False)
    return states


def test_swa_is_the_mean_of_epochs_with_statistics_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, seen = [], []
    original = state_module.end_epoch

    def spy(average, model, settings, epoch: int, batches: Callable) -> None:
        ends.append([p.detach().clone() for p in model.parameters()])
        original(average, model, settings, epoch, lambda: seen.append(list(batches())) or seen[-1])

    monkeypatch.setattr(state_module, "end_epoch", spy)
    settings = config(tmp_path, average="swa", augment="crop")
    assert settings.resolved().swa_start == 4
    run_with_state(monkeypatch, config(tmp_path, average="swa", swa_start=3, augment="crop"))
    model, _, _ = load_checkpoint(tmp_path / "last.pt")
    assert len(ends) == 4 and len(seen) == 2
    assert_weights(model, [(a + b) / 2 for a, b in zip(*ends[2:], strict=True)])
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    twin.train()
    for x, _ in seen[-1]:
        twin(x)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_channels_last_reaches_images_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = []
    original = state_module.loss_function

    def spy(*settings: Any) -> Callable:
        loss = original(*settings)

        def noting(model: nn.Module, x: Tensor, y: Tensor) -> Any:
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return loss(model, x, y)

        return noting

    monkeypatch.setattr(state_module, "loss_function", spy)
    changes = {"width": 8, "epochs": 1, "method": "none"}
    (state,) = run_with_state(monkeypatch, config(tmp_path / "a", channels_last=True, **changes))
    assert layouts == [True] * BATCHES
    weight = state.model.block1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = fit(config(tmp_path / "b", **changes), progress=False)
    assert state.history[0]["train_loss"] == pytest.approx(plain["last"]["train_loss"], rel=1e-4)


def test_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.compile

    def traced(function: Callable, **options: Any) -> Callable:
        # Traced as for a compiler, and run without one, which would take a minute.
        calls.append(function)
        return original(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    splits = data.load("digits")
    batches = list(splits.train.take(64).batches(32))
    losses = []
    for compiled in (True, False):
        settings = config(tmp_path, compile=compiled, method="none").resolved()
        state = TrainingState(settings, network_spec(settings, splits), len(batches), Ranks())
        result = train_epoch(state.parallel, batches, state.optimizer, state.loss)
        losses.append(result.loss)
        assert len(calls) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"milestones": (1,)}, "milestones must go with 'multistep', got 'cosine'"),
        ({"schedule": "multistep", "milestones": (5,)}, "within the 4 epochs, got 5"),
        ({"ema_decay": 0.9}, "ema_decay must go with 'ema', got 'none'"),
        ({"average": "ema", "ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"average": "ema", "swa_start": 1}, "swa_start must go with 'swa', got 'ema'"),
        ({"average": "swa", "swa_start": 9}, "swa_start must be within the 4 epochs, got 9"),
        ({"average": "mean"}, "average 'mean'; known: none, ema, swa"),
        ({"amp": "fp8"}, "amp 'fp8'; known: none, bf16, fp16"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"channels_last": True}, "width must be at least 8 with channels_last on a CPU, got 4"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change).resolved()
