"""A disk that fills up while a run saves its state: the last good one stays, and the run goes on."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssp_fused
from ssp_fused.adversarial import TrainConfig, checkpoint, fit, resume

OPTIONS = {"blocks": 1, "width": 4, "epochs": 2, "batch_size": 32, "limit": 64, "steps": 1}


def config(out: Path) -> TrainConfig:
    return TrainConfig(**OPTIONS, device="cpu", out=str(out))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_no_space_left_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fit(config(tmp_path / "whole"), progress=False)
    original = checkpoint.torch.save
    before: dict[str, bytes] = {}

    def full(state, file) -> None:
        # In the second epoch, after some of the file is on the disk.
        if state["epoch"] == 2 and name in file.name:
            before.update(contents(tmp_path / "run"))
            file.write(b"PK" * 1000)
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    # Better in each epoch: best.pt is written twice.
    monkeypatch.setattr("ssp_fused.adversarial.run._validate", improving())
    with pytest.raises(OSError, match="No space left on device"):
        fit(config(tmp_path / "run"), progress=False)
    monkeypatch.setattr(checkpoint.torch, "save", original)
    left = {file: data for file, data in before.items() if not file.startswith(".")}
    assert {"last.pt", "best.pt"} <= set(left) and contents(tmp_path / "run") == left
    resume(tmp_path / "run", progress=False)
    found, expected = (
        torch.load(tmp_path / run / "last.pt", weights_only=True)["model"]
        for run in ("run", "whole")
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def improving():
    scores = iter([0.1, 0.2, 0.3])

    def scripted(state, batches) -> dict[str, float]:
        return {"val_clean": 0.9, "val_robust": next(scores)}

    return scripted


def test_a_process_that_may_not_write_more_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(config(folder), progress=False)
    good = (folder / "last.pt").read_bytes()
    settings = "".join(f" --{key.replace('_', '-')} {value}" for key, value in OPTIONS.items())
    command = [sys.executable, "-m", "ssp_fused.cli", "train", *settings.split()]
    command += ["--device", "cpu", "--out", str(tmp_path / "other")]
    half = len(good) // 2
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(ssp_fused.__file__).parent.parent)},
        # Writing past it fails, as on a full disk: Python ignores the signal.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ssp-fused: error: ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "config.json",
        "metrics.jsonl",
    ]
