"""The history of runs: what their folders hold, as a table, JSON and a figure."""

import json
from pathlib import Path

import pytest
from runs import config

from ssp_fused import cli
from ssp_fused.adversarial import fit, run_history


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Run folders, and the metrics that training returned."""
    found = {}
    for method in ("none", "pgd"):
        folder = tmp_path_factory.mktemp("history") / method
        found[str(folder)] = fit(config(folder, method=method, epochs=2), progress=False)["epochs"]
    return found


def test_it_is_what_training_returned(runs: dict[str, list[dict]]) -> None:
    for folder, epochs in runs.items():
        report = run_history(folder)
        assert report == {"metrics": f"{folder}/metrics.jsonl", "epochs": epochs}
        assert len(epochs) == 2


def test_the_command(
    runs: dict[str, list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    figure, out = tmp_path / "history.pdf", tmp_path / "history.json"
    assert cli.main(["history", *runs, "--figure", str(figure), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    reports = json.loads(out.read_text())["runs"]
    assert [report["epochs"] for report in reports] == list(runs.values())
    assert lines[1].split() == ["epoch", "lr", "loss", "train", "clean", "robust"]
    for start, report in zip((2, 6), reports, strict=True):
        for line, epoch in zip(lines[start : start + 2], report["epochs"], strict=True):
            accuracies = ("train_accuracy", "val_clean", "val_robust")
            shares = [f"{epoch[key]:.1%}" for key in accuracies if key in epoch]
            assert line.split()[3:] == shares and f"{epoch['train_loss']:.3f}" in line
    assert figure.read_bytes().startswith(b"%PDF")
    assert cli.main(["history", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": reports}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no training run in"),
        ("", "no epoch has ended yet"),
        ('{"epoch": 1', "line 1 is not JSON"),
        ('{"epoch": 1}\n', "line 1 lacks lr, train_loss, train_accuracy, val_clean"),
        ("[]\n", "line 1 lacks epoch"),
    ],
)
def test_damaged_histories_are_named(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert cli.main(["history", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error and error.count("\n") == 1
