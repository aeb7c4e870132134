"""Scalars for TensorBoard, against a stand-in for its writer that keeps the contract of purge_step."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import config, stopped_at

from ssp_fused import cli
from ssp_fused.adversarial import Ranks, fit, resume, run_history
from ssp_fused.adversarial import run as run_module

MODULE = "torch.utils.tensorboard"
KEYS = {
    "loss/train": "train_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/validation_clean": "val_clean",
    "accuracy/validation_robust": "val_robust",
    "lr": "lr",
}


class DiedError(Exception):
    pass


class SummaryWriter:
    """Appends what it is told to a file; dies at an epoch of `dies_at`."""

    dies_at: int | None = None

    def __init__(self, log_dir: str, *, purge_step: int) -> None:
        assert Path(log_dir).parent.is_dir()
        Path(log_dir).mkdir(exist_ok=True)
        self.path = Path(log_dir) / "events"
        self.path.touch()
        self.lines: list[Any] = [["purge", None, purge_step]]

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if step == type(self).dies_at:
            raise DiedError
        self.lines.append([tag, value, step])

    def flush(self) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        self.lines = []

    def close(self) -> None:
        self.flush()
        self.path = None


def stand_in() -> ModuleType:
    module = ModuleType(MODULE)
    module.SummaryWriter = SummaryWriter
    return module


@pytest.fixture(autouse=True)
def _injected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, MODULE, stand_in())
    yield
    SummaryWriter.dies_at = None


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: a purge hides what was written at its step and later."""
    shown: list[list[Any]] = []
    for tag, value, step in map(json.loads, (folder / "events").read_text().splitlines()):
        if tag == "purge":
            shown = [line for line in shown if line[2] < step]
        else:
            shown.append([tag, value, step])
    found: dict[str, list[tuple[int, float]]] = {}
    for tag, value, step in shown:
        found.setdefault(tag, []).append((step, value))
    return found


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    epochs = run_history(folder)["epochs"]
    return {
        tag: [(epoch["epoch"], epoch[key]) for epoch in epochs]
        for tag, key in KEYS.items()
        if key in epochs[0]
    }


@pytest.mark.parametrize("method", ["pgd", "none"])
def test_every_epoch_is_written(tmp_path: Path, method: str) -> None:
    fit(config(tmp_path / "run", method=method, tensorboard=True), progress=False)
    found = curves(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert len(found) == 4 + (method == "pgd") and len(found["lr"]) == 3


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped_at(6, lambda: fit(config(folder, tensorboard=True), progress=False))
    assert curves(folder) == expected(folder) and len(curves(folder)["lr"]) == 1
    resume(folder, progress=False)
    assert curves(folder) == expected(folder) and len(curves(folder)["lr"]) == 3
    resume(folder, progress=False)
    assert curves(folder) == expected(folder)


def test_an_epoch_that_was_saved_and_not_written_is_made_up_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    SummaryWriter.dies_at = 2
    with pytest.raises(DiedError):
        fit(config(folder, tensorboard=True), progress=False)
    assert len(curves(folder)["lr"]) == 1 and len(run_history(folder)["epochs"]) == 2
    SummaryWriter.dies_at = None
    resume(folder, progress=False)
    assert curves(folder) == expected(folder) and len(curves(folder)["lr"]) == 3


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    fit(config(tmp_path / "run", epochs=1), progress=False)
    assert not (tmp_path / "run" / "events").exists()


def test_a_missing_package_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    options = ("--tensorboard", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert cli.main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert "pip install tensorboard" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_writes(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", tensorboard=True).resolved()
    run = run_module._Run(settings, None, False)
    for rank in (1, 0):
        run.ranks = Ranks(rank, 2)
        with run._scalars() as write:
            write({"epoch": 1, "train_loss": 0.5})
        assert (tmp_path / "run").exists() == (rank == 0)
    assert curves(tmp_path / "run") == {"loss/train": [(1, 0.5)]}
