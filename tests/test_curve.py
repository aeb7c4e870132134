"""Accuracy over the radius: each point is the named attack's at that radius."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssp_fused import cli, data
from ssp_fused.adversarial import (
    EvaluationSettings,
    TrainConfig,
    checkpoint_curve,
    evaluate,
    fit,
    load_checkpoint,
    named_attack,
)

RADII = [0.05, 0.1, 0.3]
PLACE = {"limit": 60, "device": "cpu"}
# Of the digits' defaults: the length of a step over the radius.
SHARE = 0.04 / 0.15


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve") / "run"
    sizes = {"blocks": 1, "width": 4, "epochs": 3, "batch_size": 32}
    config = TrainConfig(**sizes, method="none", lr=0.05, device="cpu", out=str(folder))
    fit(config, progress=False)
    return folder


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [SHARE * eps for eps in RADII]),
        ({"step_size": 0.01}, [0.01] * 3),
        ({"norm": "l2", "seed": 5}, [SHARE * eps for eps in RADII]),
    ],
)
def test_points_are_those_of_the_named_attack(
    trained: Path, settings: dict[str, Any], steps: list[float]
) -> None:
    report = checkpoint_curve(trained, RADII, "pgd-3", EvaluationSettings(**PLACE, **settings))
    model, _, _ = load_checkpoint(trained / "best.pt")
    expected = []
    attacked = {key: value for key, value in settings.items() if key != "step_size"}
    for eps, step_size in zip(RADII, steps, strict=True):
        attack = named_attack("pgd-3", eps=eps, step_size=step_size, **attacked)
        batches = data.load("digits").test.take(60).batches(60)
        accuracy = evaluate(model, batches, {"attack": attack})
        point = {"eps": eps, "step_size": step_size, "accuracy": accuracy["attack"]}
        expected.append(pytest.approx(point))
    clean = {"eps": 0, "step_size": 0, "accuracy": accuracy["clean"]}
    assert report["points"] == [clean, *expected]
    assert (report["attack"], report["images"]) == ("pgd-3", 60)
    assert report["norm"] == settings.get("norm", "linf")
    assert "eps" not in report and "step_size" not in report


def test_a_larger_radius_costs_accuracy(trained: Path) -> None:
    points = checkpoint_curve(trained, [0.02, 0.5], settings=EvaluationSettings(**PLACE))["points"]
    shares = [point["accuracy"] for point in points]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.3 > shares[-1]


@pytest.mark.parametrize("radii", [[], [0.0, 0.1], [0.2, 0.1], [0.1, 0.1], [-0.1], [float("inf")]])
def test_radii_must_be_positive_and_increasing(trained: Path, radii: list[float]) -> None:
    with pytest.raises(ValueError, match=r"radii must be positive and increasing, got \["):
        checkpoint_curve(trained, radii)


def test_there_is_one_place_for_the_radius(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"eps must be None where radii are given, got 0\.1"):
        checkpoint_curve(trained, RADII, settings=EvaluationSettings(eps=0.1))


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    figure, out = tmp_path / "curve.svg", tmp_path / "curve.json"
    command = ["curve", str(trained), str(trained / "last.pt"), "--radii", "8/255,0.3"]
    options = ["--attack", "fgsm", "--limit", "60", "--device", "cpu"]
    files = ["--figure", str(figure), "--out", str(out)]
    assert cli.main([*command, *options, *files]) == 0
    table = capsys.readouterr().out
    reports = json.loads(out.read_text())["runs"]
    settings = EvaluationSettings(**PLACE)
    assert reports[0] == checkpoint_curve(trained, [8 / 255, 0.3], "fgsm", settings)
    assert [Path(report["checkpoint"]).name for report in reports] == ["best.pt", "last.pt"]
    for report in reports:
        for point in report["points"]:
            assert f"{point['eps']:<10.4g}{point['accuracy']:>9.1%}\n" in table
    assert figure.read_bytes().startswith(b"<?xml")
    assert cli.main([*command, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": reports}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--radii"),
        (["--radii", "many"], "--radii"),
        (["--radii", "0.1", "--eps", "0.1"], "--eps"),
        (["--radii", "0.2,0.1"], "radii must be positive and increasing"),
        (["--radii", "0.1", "--attack", "nope"], "unknown attack 'nope'"),
    ],
)
def test_bad_options_are_one_line(
    trained: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["curve", str(trained), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
