"""The command line, end to end on the embedded digits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssp_fused
from ssp_fused import cli, demo
from ssp_fused.adversarial import TrainConfig

SMALL = (
    *("--blocks", 1, "--width", 4, "--steps", 2, "--epochs", 1),
    *("--limit", 128, "--batch-size", 32, "--device", "cpu"),
)


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert run("train", "--data", "digits", "--model", "ssp3", "--out", folder, *SMALL) == 0
    return folder


def test_train_writes_the_run_folder(trained: Path) -> None:
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["best.pt", "config.json", "last.pt", "metrics.jsonl"]
    settings = json.loads((trained / "config.json").read_text())
    assert (settings["model"], settings["steps"], settings["eps"]) == ("ssp3", 2, 0.15)
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1


def test_evaluate_prints_a_table_and_json(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quick = ("--device", "cpu", "--masking-images", 0)
    assert run("evaluate", trained, "--limit", 100, *quick) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["clean", "fgsm", "pgd-20", "worst"]
    share = r" +\d+\.\d% +\d+\.\d% to \d+\.\d%( +ssp_fused .+)?"
    assert all(re.fullmatch(rf"\S+{share}", line) for line in lines[-4:])
    out = tmp_path / "report.json"
    options = ("--eps", "8/255", "--step-size", "0.01", "--last", "--limit", 100, "--out", out)
    attacks = ("--attack", "pgd-3, sspnet-pgd-2,pgd-1x2", *quick)
    assert run("evaluate", trained, *options, *attacks, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report["eps"] == 8 / 255 and report["images"] == 100
    assert report["checkpoint"].endswith("last.pt")
    accuracy = report["accuracy"]
    assert list(accuracy) == ["clean", "pgd-3", "sspnet-pgd-2", "pgd-1x2", "worst"]
    assert 0 <= accuracy["worst"] <= min(accuracy.values()) <= accuracy["clean"] <= 1


@pytest.mark.parametrize("scheme", ["res", "midrk2", "ark", "ssp43", "ssp22,adaptive,euler"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_kind_of_network_trains(tmp_path: Path, scheme: str, norm: str) -> None:
    options = ("--norm", norm, "--method", "none", "--lr", "0.01", "--out", tmp_path / "run")
    assert run("train", "--scheme", scheme, *options, *SMALL) == 0


def test_options_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    best = {"epoch": 1, "val_clean": 1.0}
    monkeypatch.setattr(
        cli, "fit", lambda config: seen.append(config) or {"best": best, "out": "o"}
    )
    command = (
        "train --data fashion-mnist --data-dir d --download --image-size 3 --augment crop "
        "--network mnist --model ssp33 --blocks 4 --width 8 --norm group "
        "--method pgd --eps 8/255 --step-size 2/255 --steps 5 --epochs 6 --batch-size 7 --lr 0.5 "
        "--schedule onecycle --seed 9 --limit 10 --out o --device cpu --backend reference"
    )
    assert run(*command.split()) == 0
    assert seen == [
        TrainConfig(
            data="fashion-mnist",
            data_dir="d",
            download=True,
            image_size=3,
            augment="crop",
            network="mnist",
            model="ssp33",
            blocks=4,
            width=8,
            norm="group",
            method="pgd",
            eps=8 / 255,
            step_size=2 / 255,
            steps=5,
            epochs=6,
            batch_size=7,
            lr=0.5,
            schedule="onecycle",
            seed=9,
            limit=10,
            out="o",
            device="cpu",
            backend="reference",
        )
    ]


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert run("info") == 0
    out = capsys.readouterr().out
    assert f"ssp-fused {ssp_fused.__version__}, torch {torch.__version__}" in out
    for name, reason in ssp_fused.available_backends().items():
        assert f"  {name}" in out and (reason or "usable") in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
        ("train --epochs many", "--epochs: invalid int value: 'many'"),
        ("train --eps 1/0", "--eps"),
        ("train --eps -0.1", "eps must not be negative"),
        ("train --data nope", "unknown data set 'nope'; known: digits"),
        ("train --model nope", "unknown model 'nope'; known: res"),
        ("train --norm nope", "unknown norm 'nope'"),
        ("train --method nope", "unknown method 'nope'"),
        ("train --backend nope", "--backend: invalid choice: 'nope'"),
        ("train --device tpu", "device"),
        ("train --data mnist --data-dir /nonexistent", "/nonexistent"),
        ("train --lr 1e30 --method none", "training diverged"),
        ("train --network nope", "unknown network 'nope'; known: cifar"),
        ("train --augment nope", "unknown augment 'nope'; known: none, crop"),
        ("train --network mnist", "at least 10x10 pixels, those of digits are 8x8"),
        ("train --data cifar10 --image-size 9", "image_size"),
        ("train --download", "download"),
        ("evaluate", "RUN_DIR"),
        ("evaluate /nonexistent", "no checkpoint /nonexistent/best.pt"),
        ("evaluate /nonexistent.pt", "no checkpoint /nonexistent.pt"),
        ("evaluate /nonexistent --norm l3", "--norm: invalid choice: 'l3'"),
        ("evaluate /nonexistent --out /nonexistent/report.json", "--out: there is no folder"),
        ("growth", "RUN_DIR"),
        ("growth /nonexistent", "no checkpoint /nonexistent/best.pt"),
        ("convert /nonexistent.pt", "OUT"),
        ("convert /nonexistent.pt out.pt", "no checkpoint /nonexistent.pt"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    words = command.split()
    if words[:1] == ["train"]:
        words += ["--out", str(tmp_path / "run"), "--limit", "64", "--width", "4"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ssp-fused: error: ")
    assert message in error


def test_damaged_checkpoint_and_used_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    assert run("evaluate", tmp_path) == 2
    assert "best.pt: not a checkpoint" in capsys.readouterr().err
    assert run("train", "--out", trained, *SMALL) == 2
    assert "already holds a training run" in capsys.readouterr().err
    assert run("evaluate", trained, "--eps", "-1", "--device", "cpu") == 2
    assert "eps" in capsys.readouterr().err
    assert run("evaluate", trained, "--attack", "deepfool", "--device", "cpu") == 2
    assert "unknown attack 'deepfool'; known: fgsm; pgd-K" in capsys.readouterr().err
    assert run("evaluate", trained / "best.pt", "--last", "--device", "cpu") == 2
    assert "last must go with a run folder" in capsys.readouterr().err
    assert run("train", "--resume", tmp_path, "--device", "cpu") == 2
    assert "no training run in" in capsys.readouterr().err


def test_ctrl_c_and_unexpected_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def raising(error: BaseException):
        def fit(config: TrainConfig):
            raise error

        return fit

    monkeypatch.setattr(cli, "fit", raising(KeyboardInterrupt()))
    assert run("train") == 130
    assert capsys.readouterr().err == "ssp-fused: interrupted\n"
    monkeypatch.setattr(cli, "fit", raising(KeyError("lost")))
    assert run("train") == 2
    assert capsys.readouterr().err == "ssp-fused: error: KeyError: 'lost'\n"
    monkeypatch.setattr(cli, "fit", raising(RuntimeError("first line\nsecond line")))
    assert run("train") == 2
    assert capsys.readouterr().err == "ssp-fused: error: first line\n"


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "ssp_fused.cli", "train", "--model", "nope"]
    root = str(Path(ssp_fused.__file__).parent.parent)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ssp-fused: error: unknown model 'nope'")


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo, "_SPEED_IMAGE", (3, 8, 8))
    monkeypatch.setattr(demo, "_SPEED_BATCH", 4)
    monkeypatch.setattr(demo, "EPS_CURVE", (0.15,))
    monkeypatch.setattr(
        demo, "TrainConfig", lambda **given: TrainConfig(**given, width=4, steps=1, limit=128)
    )
    # Twice into the same folder: a demo can be run again.
    for _ in range(2):
        demo.main(["--out", str(tmp_path), "--epochs", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    for title in ("ResNet twin", "SSP-2", "SSP-3", "PGD-20", "Images per second"):
        assert title in out or (title == "Images per second" and "No fused layers" in out)
    assert (tmp_path / "demo.png").is_file() or "matplotlib is not installed" in out
    found = json.loads((tmp_path / demo.RESULTS).read_text())
    assert [row["network"] for row in found["networks"]] == ["ResNet twin", "SSP-2", "SSP-3"]
    for row in found["networks"]:
        assert f"{row['pgd20']:.1%}" in out and f"{row['parameters']:,}" in out
    assert bool(found["images_per_second"]) == ("Images per second" in out)
