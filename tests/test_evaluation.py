"""Named attacks, accuracies under them, and the reports of checkpoints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import __version__, cli, data, models, use_backend
from ssp_fused.adversarial import (
    EvaluationSettings,
    TrainConfig,
    evaluate,
    evaluate_checkpoint,
    fgsm,
    fit,
    named_attack,
    named_attacks,
    pgd,
)

EPS, STEP = 0.1, 0.03


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=4, in_channels=1).eval()


def batch(count: int = 24) -> tuple[Tensor, Tensor]:
    return next(data.load("digits").test.batches(count))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    sizes = {"blocks": 1, "width": 4, "steps": 1, "epochs": 2, "limit": 128, "batch_size": 32}
    fit(TrainConfig(**sizes, device="cpu", out=str(folder)), progress=False)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pgd-3", {"steps": 3}),
        ("pgd-2x3", {"steps": 2, "restarts": 3}),
        ("sspnet-pgd-4", {"steps": 4, "random_start": False}),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_names_stand_for_pgd(name: str, expected: dict[str, Any], norm: str) -> None:
    model, (x, y) = small_network(), batch()
    attack = named_attack(name, eps=EPS, step_size=STEP, norm=norm, seed=3)
    generator = torch.Generator().manual_seed(3)
    plain = pgd(model, x, y, eps=EPS, step_size=STEP, norm=norm, generator=generator, **expected)
    assert torch.equal(attack(model, x, y), plain)


def test_fgsm_takes_one_step_of_eps() -> None:
    model, (x, y) = small_network(), batch()
    attack = named_attack("fgsm", eps=EPS, step_size=STEP)
    assert torch.equal(attack(model, x, y), fgsm(model, x, y, eps=EPS))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "FGSM",
        "pgd",
        "pgd-0",
        "pgd-x3",
        "pgd-3x0",
        "pgd-3x",
        "fgsm-2",
        "sspnet-pgd-2x2",
        "pgd-²",
    ],
)
def test_other_names_get_the_grammar(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown attack .*; known: fgsm; pgd-K: .*pgd-KxR"):
        named_attack(name, eps=EPS, step_size=STEP)


def test_attacks_do_not_depend_on_each_other() -> None:
    model, (x, y) = small_network(), batch()
    both = named_attacks(["pgd-1x2", "pgd-1"], eps=EPS, step_size=STEP)
    together = {name: attack(model, x, y) for name, attack in both.items()}
    for name, images in together.items():
        alone = named_attacks([name], eps=EPS, step_size=STEP)[name]
        assert torch.equal(alone(model, x, y), images)
    assert not torch.equal(together["pgd-1"], together["pgd-1x2"])
    with pytest.raises(ValueError, match="'fgsm' is named twice"):
        named_attacks(["fgsm", "fgsm"], eps=EPS, step_size=STEP)


class Threshold(nn.Module):
    """Says 1 where the image's only pixel is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        value = x.flatten(1)
        return torch.cat([0.5 - value, value - 0.5], dim=1)


def test_worst_counts_what_withstands_everything() -> None:
    x = torch.tensor([0.1, 0.4, 0.6, 0.9, 0.9]).view(5, 1, 1, 1)
    y = torch.tensor([0, 0, 1, 1, 0])

    def shifted(amount: float) -> Any:
        return lambda model, images, labels: images + amount

    attacks = {"up": shifted(0.2), "down": shifted(-0.2), "far": shifted(-0.5)}
    shares = evaluate(Threshold(), [(x[:2], y[:2]), (x[2:], y[2:])], attacks)
    # Up: the second falls. Down: the third falls. Far: the third and fourth fall, the fifth is
    # right by accident, which is not to withstand.
    assert shares == pytest.approx({"clean": 0.8, "up": 0.6, "down": 0.6, "far": 0.6, "worst": 0.2})
    alone = evaluate(Threshold(), [(x, y)], {"far": attacks["far"]})
    assert (alone["far"], alone["worst"]) == pytest.approx((0.6, 0.4))
    assert list(evaluate(Threshold(), [(x, y)])) == ["clean"]
    with pytest.raises(ValueError, match="must not be named 'worst'"):
        evaluate(Threshold(), [(x, y)], {"worst": shifted(0)})


def test_a_report_says_where_it_comes_from(trained: Path) -> None:
    settings = EvaluationSettings(limit=60, batch_size=25, seed=4, device="cpu", last=True)
    report = evaluate_checkpoint(trained, ["pgd-2"], settings)
    assert report == json.loads(json.dumps(report))
    assert report["checkpoint"] == str(trained / "last.pt")
    assert report["versions"]["ssp_fused"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    expected = {"epoch": 2, "data": "digits", "images": 60, "norm": "linf", "eps": 0.15}
    expected |= {"step_size": 0.04, "seed": 4, "batch_size": 25, "device": "cpu"}
    assert {key: report[key] for key in expected} == expected
    assert list(report["accuracy"]) == ["clean", "pgd-2", "worst"]
    again = evaluate_checkpoint(trained / "last.pt", ["pgd-2"], replace(settings, last=False))
    assert again == report
    model = torch.load(trained / "last.pt", weights_only=True)
    assert report["model"] == model["config"]["model"]


def test_the_backend_of_a_report_is_the_one_that_served(trained: Path) -> None:
    settings = EvaluationSettings(limit=10, device="cpu")
    reference = evaluate_checkpoint(trained, ["fgsm"], replace(settings, backend="reference"))
    assert reference["backend"] == "reference"
    with use_backend("reference"):
        assert evaluate_checkpoint(trained, ["fgsm"], settings)["backend"] == "reference"


def test_l2_needs_its_radius(trained: Path) -> None:
    settings = EvaluationSettings(norm="l2", limit=20, device="cpu")
    with pytest.raises(ValueError, match="eps must be given with norm l2"):
        evaluate_checkpoint(trained, ["pgd-2"], settings)
    report = evaluate_checkpoint(trained, ["pgd-2"], replace(settings, eps=0.3))
    assert (report["norm"], report["eps"]) == ("l2", 0.3)
    assert report["step_size"] == pytest.approx(0.3 * 0.04 / 0.15)
    own = evaluate_checkpoint(trained, ["pgd-2"], replace(settings, eps=0.3, step_size=0.2))
    assert own["step_size"] == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"eps": -0.5}, "eps must be finite and not negative"),
        ({"norm": "l3"}, "unknown norm 'l3'; known: linf, l2"),
        ({"data": "nope"}, "unknown data set 'nope'"),
        ({"image_size": 9}, "image_size"),
        ({"download": True}, "download"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_settings_are_named(trained: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(
            trained, ["fgsm"], EvaluationSettings(**{"device": "cpu", "limit": 5, **change})
        )


def test_data_that_does_not_fit_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = data.load("digits")
    coloured = replace(splits.test, images=splits.test.images.repeat(1, 3, 1, 1))
    small = replace(splits.test, images=splits.test.images[..., :3, :3])
    settings = EvaluationSettings(limit=5, device="cpu")
    for other, message in (
        (replace(splits, train=coloured, test=coloured), r"of 1 channels in 10 .* has 3 channels"),
        (replace(splits, num_classes=7), r"in 10 classes, .* 7 classes"),
        (replace(splits, train=small, test=small), "at least 4x4 pixels, those of digits are 3x3"),
    ):
        monkeypatch.setattr(data, "load", lambda *_, other=other, **__: other)
        with pytest.raises(ValueError, match=message):
            evaluate_checkpoint(trained, ["fgsm"], settings)


def write_images(folder: Path, side: int, classes: int = 2, seed: int = 0) -> None:
    image_module = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(seed)
    for label in range(classes):
        for index in range(20):
            path = folder / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
            image_module.frombytes("RGB", (side, side), bytes(pixels.flatten().tolist())).save(path)


def test_a_folder_s_run_is_evaluated_on_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path / "one", 12)
    write_images(tmp_path / "elsewhere" / "two", 16, seed=1)
    write_images(tmp_path / "three", 12, classes=3)
    monkeypatch.chdir(tmp_path)
    train = "train --data folder:one --image-size 8 --blocks 1 --width 4 --steps 1 --epochs 1"
    assert cli.main([*train.split(), "--batch-size", "8", "--device", "cpu"]) == 0
    run = "runs/folder-one-ssp2-pgd-seed0"
    state = torch.load(f"{run}/best.pt", weights_only=True)
    assert state["config"]["augment"] == "crop-flip"
    for place, name in (
        ([], "folder:one"),
        (["--data-dir", "elsewhere/two"], "folder:elsewhere/two"),
        (["--data", "folder:elsewhere/two"], "folder:elsewhere/two"),
        (["--data", "folder:two", "--data-dir", "elsewhere"], "folder:two"),
    ):
        command = ["evaluate", run, "--attack", "fgsm", "--device", "cpu", "--json", *place]
        capsys.readouterr()
        assert cli.main(command) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["data"] == name and report["images"] == 4
    assert cli.main(["evaluate", run, "--data", "folder:three", "--device", "cpu"]) == 2
    assert "in 2 classes" in capsys.readouterr().err
