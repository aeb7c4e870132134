"""Runs that are stopped and go on: the same bits as runs that are not, and what stands in the way."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    BATCHES,
    assert_same,
    assert_same_run,
    config,
    ctrl_c,
    raise_at,
    stopped_at,
    without_times,
)
from torch import nn

import ssp_fused
from ssp_fused import cli, data
from ssp_fused.adversarial import TrainingInterrupted, fit, resume
from ssp_fused.adversarial import run as run_module
from ssp_fused.adversarial import state as state_module
from ssp_fused.adversarial.interrupts import Interrupts


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """Python's handler of Ctrl-C, which processes started in the background do without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "whole"
    fit(config(folder), progress=False)
    return folder


# In the middle of epochs, in the last batch of one (so that validation is cut short), and twice.
@pytest.mark.parametrize("stops", [(1,), (3,), (4,), (6,), (2, 1, 7)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Path, stops: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    first, *later = stops
    told = stopped_at(first, lambda: fit(config(folder), progress=False))
    seen = first
    for stop in later:
        told = stopped_at(stop, lambda: resume(folder, progress=False))
        seen += stop
    epoch, batch = divmod(seen - 1, BATCHES)
    assert f"epoch {epoch + 1} after batch {batch + 1} of {BATCHES}" in told
    assert told.endswith(f"ssp-fused train --resume {folder}")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["epoch"] == epoch and state["training"]["totals"]["batches"] == batch + 1
    # What was drawn in between must not matter.
    torch.rand(7)
    result = resume(folder, progress=False)
    assert [metrics["epoch"] for metrics in result["epochs"]] == [1, 2, 3]
    assert result["best"] in result["epochs"] and result["last"] == result["epochs"][-1]
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none", "schedule": "onecycle", "augment": "none"},
        {"norm": "group", "model": "ark", "momentum": 0.0},
        {"data": "digits", "network": "mnist"},
        {"method": "free", "replays": 3},
        {"method": "trades", "average": "ema", "schedule": "multistep"},
        {"method": "n-fgsm", "average": "swa", "swa_start": 1, "amp": "bf16"},
    ],
)
def test_other_settings_go_on_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    splits = data.load("digits")
    if changes.get("network") == "mnist":
        splits = enlarged(splits)
    settings = {"epochs": 2, "limit": 96, **changes}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(config(whole, **settings), splits, progress=False)
    stopped_at(2, lambda: fit(config(parts, **settings), splits, progress=False))
    # At the end of an epoch, in its validation: what the epoch adds to an average is added once.
    stopped_at(1, lambda: resume(parts, splits, progress=False))
    resume(parts, splits, progress=False)
    assert_same_run(parts, whole)


def test_a_run_is_saved_between_epochs_too(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise MemoryError

    folder = tmp_path / "run"
    raise_at(monkeypatch, BATCHES + 4, crash)
    with pytest.raises(MemoryError):
        fit(config(folder, save_every=3), progress=False)
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and state["training"]["totals"]["batches"] == 3
    monkeypatch.undo()
    resume(folder, progress=False)
    for name in ("last.pt", "best.pt"):
        found, expected = (
            torch.load(run / name, weights_only=True)["model"] for run in (folder, uninterrupted)
        )
        assert_same(found, expected)


def test_sigterm_stops_a_run_as_ctrl_c_does(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        raise_at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingInterrupted):
            fit(config(tmp_path / "run"), progress=False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resume(tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", uninterrupted)


def enlarged(splits: data.ImageSplits) -> data.ImageSplits:
    def twice(part: data.ImageSet) -> data.ImageSet:
        wide = part.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return replace(part, images=wide)

    return replace(splits, **{name: twice(getattr(splits, name)) for name in ("train", "val")})


def test_random_numbers_of_the_network_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = state_module.build_network

    def with_dropout(spec: dict[str, Any]) -> nn.Module:
        network = original(spec)
        network.avg = nn.Sequential(network.avg, nn.Dropout(0.5))
        return network

    monkeypatch.setattr(state_module, "build_network", with_dropout)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(config(whole, epochs=1), progress=False)
    stopped_at(2, lambda: fit(config(parts, epochs=1), progress=False))
    torch.manual_seed(5)
    resume(parts, progress=False)
    assert_same_run(parts, whole)


def test_the_best_epoch_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.2, 0.4])

    def scripted(_: state_module.TrainingState, batches: Any) -> dict[str, float]:
        list(batches)
        return {"val_clean": 0.9, "val_robust": next(scores)}

    monkeypatch.setattr(run_module, "_validate", scripted)
    stopped_at(BATCHES + 2, lambda: fit(config(tmp_path / "run"), progress=False))
    result = resume(tmp_path / "run", progress=False)
    assert result["best"]["epoch"] == 1
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == 1


def test_a_crash_between_the_files_loses_nothing(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = torch.load(uninterrupted / "best.pt", weights_only=True)["epoch"]
    # After last.pt of the epochs before the best one: nothing but last.pt may be ahead.
    folder = tmp_path / "run"
    monkeypatch.setattr(run_module._Run, "_write_results", lambda _: None)
    original = run_module._Run._save

    def save_then_crash(self: Any) -> None:
        original(self)
        if len(self.state.history) == best:
            raise MemoryError

    monkeypatch.setattr(run_module._Run, "_save", save_then_crash)
    with pytest.raises(MemoryError):
        fit(config(folder), progress=False)
    monkeypatch.undo()
    assert not (folder / "best.pt").exists() and not (folder / "metrics.jsonl").exists()
    resume(folder, progress=False)
    assert_same_run(folder, uninterrupted)


def test_a_finished_run_says_so(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (uninterrupted / "last.pt").read_bytes()
    assert cli.main(["train", "--resume", str(uninterrupted)]) == 0
    out = capsys.readouterr().out
    assert f"{uninterrupted} is finished: all 3 epochs are trained" in out
    assert "best epoch" in out
    assert (uninterrupted / "last.pt").read_bytes() == before


def test_a_run_goes_on_elsewhere(tmp_path: Path, uninterrupted: Path) -> None:
    stopped_at(3, lambda: fit(config(tmp_path / "old"), progress=False))
    (tmp_path / "old").rename(tmp_path / "new")
    result = resume(tmp_path / "new", data_dir="somewhere", backend="reference", progress=False)
    assert result["out"] == str(tmp_path / "new")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (settings["data_dir"], settings["backend"]) == ("somewhere", "reference")
    # Other kernels, other rounding; still the same training.
    expected = torch.load(uninterrupted / "last.pt", weights_only=True)["metrics"]
    assert result["last"]["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)


def test_only_the_place_may_differ(uninterrupted: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--resume", str(uninterrupted), "--epochs", "9", "--batch-size", "4"]
    assert cli.main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert "--epochs, --batch-size: not with --resume" in error and error.count("\n") == 1
    place = ["--data-dir", "d", "--device", "cpu", "--backend", "auto"]
    assert cli.main(["train", "--resume", str(uninterrupted), *place]) == 0


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    stopped_at(2, lambda: fit(config(tmp_path / "run"), progress=False))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda run: [f.unlink() for f in run.iterdir()], FileNotFoundError, "no training run in"),
        (lambda run: (run / "last.pt").unlink(), FileNotFoundError, "before its first save"),
        (lambda run: truncate(run / "last.pt"), ValueError, r"last\.pt: not a checkpoint"),
        (lambda run: truncate(run / "config.json"), ValueError, r"config\.json: not the settings"),
        (lambda run: edit_settings(run, lr=0.5, seed=3), ValueError, "lr, seed not as in"),
        (lambda run: edit_settings(run, colour="red"), ValueError, "colour"),
        (lambda run: edit_state(run, "training"), ValueError, "lacks training"),
        (lambda run: edit_state(run, "training", []), ValueError, "cannot be continued"),
        (lambda run: edit_state(run, "model", {}), ValueError, "cannot be continued .*Missing key"),
        (lambda run: edit_state(run, "config", 3), ValueError, "not the state of a training run"),
    ],
)
def test_what_cannot_go_on_is_named(
    stopped: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(stopped)
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(error, match=message):
        resume(stopped, progress=False)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def edit_settings(run: Path, **changes: Any) -> None:
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, **changes}))


def edit_state(run: Path, key: str, *value: Any) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    del state[key]
    torch.save({**state, **({key: value[0]} if value else {})}, run / "last.pt")


def test_data_that_changed_is_refused(stopped: Path) -> None:
    splits = data.load("digits")
    fewer = replace(splits, train=splits.train.take(100))
    with pytest.raises(ValueError, match=r"has changed.*'train': 128.*'train': 100"):
        resume(stopped, fewer, progress=False)
    with pytest.raises(ValueError, match="has changed"):
        resume(stopped, replace(splits, mean=(0.3,)), progress=False)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        ctrl_c()
        ctrl_c()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        raise_at(monkeypatch, BATCHES + 2, twice)
        with pytest.raises(KeyboardInterrupt) as caught:
            fit(config(tmp_path / "run"), progress=False)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and state["training"]["totals"]["batches"] == 0


def test_handlers_come_back_and_are_left_alone_elsewhere() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ArithmeticError), Interrupts():
        assert signal.getsignal(signal.SIGINT) is not handler
        raise ArithmeticError
    assert signal.getsignal(signal.SIGINT) is handler
    with Interrupts() as interrupts:
        ctrl_c()
        assert interrupts.noted
        with pytest.raises(TrainingInterrupted):
            next(interrupts.watch([1]))
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(Interrupts().watch([1, 2])) == [1, 2]

    seen = []

    def in_a_thread() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [handler]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            ctrl_c()
        assert not interrupts.noted and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_process_stops_on_sigint_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    options = (
        "--blocks 1 --width 4 --steps 1 --epochs 2 --limit 160 --batch-size 8 --device cpu "
        "--augment crop"
    )
    command = [sys.executable, "-m", "ssp_fused.cli", "train"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(ssp_fused.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*command, *options.split(), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A process whose parent ignores SIGINT would ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.fullmatch(
        r"ssp-fused: interrupted: stopped in epoch 2 after batch \d+ of 20, state saved; to go on: "
        rf"ssp-fused train --resume {re.escape(str(folder))}\n",
        errors,
    )
    position = torch.load(folder / "last.pt", weights_only=True)["training"]["totals"]["batches"]
    assert position < 20
    torch.set_num_threads(1)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert f"going on with epoch 2 after batch {position} of 20" in capsys.readouterr().out
    assert cli.main(["train", *options.split(), "--out", str(whole)]) == 0
    settings = (json.loads((run / "config.json").read_text()) for run in (folder, whole))
    assert_same(*map(without_times, settings))
    assert_same_run(folder, whole)
