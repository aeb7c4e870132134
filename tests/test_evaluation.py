"""Named attacks, accuracies under them, and the reports of checkpoints."""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import __version__, cli, data, models, use_backend
from ssp_fused._backends import current
from ssp_fused.adversarial import (
    EvaluationSettings,
    Ranks,
    TrainConfig,
    checkpoint_curve,
    checkpoint_growth,
    evaluate,
    evaluate_checkpoint,
    fgsm,
    fit,
    load_checkpoint,
    named_attack,
    named_attacks,
    pgd,
)
from ssp_fused.adversarial.outcomes import dealt, wilson_interval
from ssp_fused.adversarial.precision import full_float32
from ssp_fused.adversarial.transfer import transfer_outcomes, transfer_report

EPS, STEP = 0.1, 0.03


def quick(path: Path, attacks: list[str], settings: EvaluationSettings, **more: Any) -> dict:
    """A report without checks for gradient masking, which most tests here are not about."""
    return evaluate_checkpoint(path, attacks, settings, masking_images=0, **more)


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
    report = quick(trained, ["pgd-2"], settings)
    assert report == json.loads(json.dumps(report))
    assert report["checkpoint"] == str(trained / "last.pt")
    assert report["versions"]["ssp_fused"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    expected = {"epoch": 2, "data": "digits", "images": 60, "norm": "linf", "eps": 0.15}
    expected |= {"step_size": 0.04, "seed": 4, "batch_size": 25, "device": "cpu"}
    assert {key: report[key] for key in expected} == expected
    assert list(report["accuracy"]) == ["clean", "pgd-2", "worst"]
    again = quick(trained / "last.pt", ["pgd-2"], replace(settings, last=False))
    assert again == report
    model = torch.load(trained / "last.pt", weights_only=True)
    assert report["model"] == model["config"]["model"]


def test_a_report_repeats_itself(trained: Path) -> None:
    settings = EvaluationSettings(limit=45, batch_size=20, seed=7, device="cpu", eps=0.1)
    first = evaluate_checkpoint(
        trained, ["pgd-1x2", "fgsm"], settings, transfer=True, masking_images=6
    )
    assert first == json.loads(json.dumps(first))
    again = evaluate_checkpoint(
        first["checkpoint"],
        list(first["attacks"]),
        EvaluationSettings(**first["settings"]),
        transfer=first["transfer"] is not None,
        masking_images=first["masking"]["images"],
    )
    assert again == first
    assert first["data_sha256"] != quick(trained, [], replace(settings, limit=44))["data_sha256"]
    other = quick(trained, list(first["attacks"]), replace(settings, seed=8))
    assert other["outcomes"]["fgsm"] == first["outcomes"]["fgsm"]


def test_outcomes_are_those_of_the_images(trained: Path) -> None:
    settings = EvaluationSettings(limit=45, batch_size=20, seed=7, device="cpu", eps=0.1)
    report = quick(trained, ["pgd-1x2", "fgsm"], settings)
    model, _, _ = load_checkpoint(trained / "best.pt")
    expected: dict[str, list[bool]] = {"clean": [], "pgd-1x2": [], "fgsm": []}
    batches = data.load("digits").test.take(45).batches(20)
    for index, (x, y) in enumerate(batches):
        names = ("pgd-1x2", "fgsm")
        attacks = named_attacks(names, eps=0.1, step_size=report["step_size"], seed=7 + index)
        for name, images in (("clean", x), *((n, f(model, x, y)) for n, f in attacks.items())):
            with torch.no_grad():
                expected[name] += (model(images).argmax(dim=1) == y).tolist()
    expected["worst"] = [all(row) for row in zip(*expected.values(), strict=True)]
    assert [*report["outcomes"]] == [*report["accuracy"]] == [*report["confidence_95"]]
    for name, right in expected.items():
        assert report["outcomes"][name] == "".join("01"[value] for value in right)
        assert report["accuracy"][name] == sum(right) / 45
        assert report["confidence_95"][name] == wilson_interval(sum(right), 45)
    served = {"library": "ssp_fused", "version": __version__, "warnings": {}}
    assert report["attacks"] == {"pgd-1x2": served, "fgsm": served}
    assert (report["transfer"], report["masking"], report["processes"]) == (None, None, 1)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (5, 10), (1, 3), (6123, 10000)])
def test_intervals_are_wilson_s(hits: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)
    low, high = wilson_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1


def test_other_libraries_serve_under_their_names(trained: Path) -> None:
    for library in ("pyautoattack", "torchattacks"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    settings = EvaluationSettings(limit=8, device="cpu")
    report = quick(trained, ["apgd-ce", "cw"], settings)
    for name, library in (("apgd-ce", "pyautoattack"), ("cw", "torchattacks")):
        served = report["attacks"][name]
        assert (served["library"], served["version"]) == (library, version(library))
    assert report["accuracy"]["worst"] <= report["accuracy"]["cw"]


class Twofold(nn.Module):
    """Says 1 for bright images under the reference backend, for dark ones under any other."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.flatten(1).mean(dim=1) > 0.5).long()
        says = bright if current() == "reference" else 1 - bright
        return nn.functional.one_hot(says, 2).float()


def painted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All bright where the reference backend attacks, all dark elsewhere."""
    return torch.full_like(x, float(current() == "reference"))


def test_transfer_makes_on_one_backend_and_classifies_on_the_other() -> None:
    x, y = torch.rand(3, 1, 2, 2), torch.ones(3, dtype=torch.int64)
    made = []

    def attacks() -> dict[str, Any]:
        made.append(current())
        return {"a": painted}

    with use_backend("auto"):
        found = transfer_outcomes(Twofold(), x, y, attacks, "cpu")
        assert current() == "auto"
    assert made == ["cpu", "reference"]
    pairs = {name: bool(right.all()) for name, right in found.items() if name.startswith("a: ")}
    assert pairs == {
        "a: cpu on cpu": True,
        "a: cpu on reference": False,
        "a: reference on cpu": False,
        "a: reference on reference": True,
    }
    assert torch.equal(found["a"], found["a: cpu on cpu"])
    report = transfer_report(found, ["a"], "cpu")["a"]
    assert report["differs"] == {
        "cpu on cpu": 0,
        "cpu on reference": 3,
        "reference on cpu": 3,
        "reference on reference": 0,
    }
    assert report["accuracy"]["cpu on reference"] == 0


def test_transfer_of_a_checkpoint(trained: Path) -> None:
    settings = EvaluationSettings(limit=30, device="cpu")
    report = quick(trained, ["pgd-3"], settings, transfer=True)
    pairs = report["transfer"]["pgd-3"]
    own = report["backend"]
    assert pairs["outcomes"][f"{own} on {own}"] == report["outcomes"]["pgd-3"]
    alone = quick(trained, ["pgd-3"], settings)
    assert alone["outcomes"] == report["outcomes"]
    reference = quick(trained, ["pgd-3"], replace(settings, backend="reference"))
    assert pairs["outcomes"]["reference on reference"] == reference["outcomes"]["pgd-3"]
    with pytest.raises(ValueError, match="transfer must go with another backend than reference"):
        quick(trained, ["pgd-3"], replace(settings, backend="reference"), transfer=True)


def test_a_run_is_checked_for_masking(trained: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("--attack", "fgsm", "--limit", "12", "--device", "cpu", "--masking-images", "8")
    assert cli.main(["evaluate", str(trained), *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"gradient masking: (no sign|signs of it) on 8 images", out)
    for name in ("radius", "steps", "single step", "black box", "gradients"):
        assert re.search(rf"^  {name} +(passed|suspicious|not run) ", out, re.MULTILINE)
    with pytest.raises(ValueError, match="masking_images must not be negative, got -1"):
        evaluate_checkpoint(trained, ["fgsm"], masking_images=-1)


def test_float32_is_not_rounded_in_an_evaluation() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(KeyError), full_float32():
                assert matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise KeyError
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_batches_are_dealt_and_come_back_in_order(processes: int) -> None:
    batches = [(torch.arange(i, i + 2), torch.arange(i, i + 2)) for i in range(0, 8, 2)]
    parts: list[Any] = []

    class Gathering(Ranks):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return parts

    measured = []
    for rank in range(processes):
        ranks = Gathering(rank, processes)
        found = dealt(batches, lambda i, x, y: measured.append(i) or {"a": x, "b": y + i}, ranks)
    assert sorted(measured) == [0, 1, 2, 3]
    assert found["a"].tolist() == [*range(8)]
    assert found["b"].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]


def test_the_backend_of_a_report_is_the_one_that_served(trained: Path) -> None:
    settings = EvaluationSettings(limit=10, device="cpu")
    reference = quick(trained, ["fgsm"], replace(settings, backend="reference"))
    assert reference["backend"] == "reference"
    with use_backend("reference"):
        assert quick(trained, ["fgsm"], settings)["backend"] == "reference"


def test_l2_needs_its_radius(trained: Path) -> None:
    settings = EvaluationSettings(norm="l2", limit=20, device="cpu")
    with pytest.raises(ValueError, match="eps must be given with norm l2"):
        quick(trained, ["pgd-2"], settings)
    report = quick(trained, ["pgd-2"], replace(settings, eps=0.3))
    assert (report["norm"], report["eps"]) == ("l2", 0.3)
    assert report["step_size"] == pytest.approx(0.3 * 0.04 / 0.15)
    own = quick(trained, ["pgd-2"], replace(settings, eps=0.3, step_size=0.2))
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
        quick(trained, ["fgsm"], EvaluationSettings(**{"device": "cpu", "limit": 5, **change}))


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
            quick(trained, ["fgsm"], settings)


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
        command += ["--masking-images", "0"]
        capsys.readouterr()
        assert cli.main(command) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["data"] == name and report["images"] == 4
    assert cli.main(["evaluate", run, "--data", "folder:three", "--device", "cpu"]) == 2
    assert "in 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "measuring", "measure"),
    [
        ("evaluation", "outcomes", evaluate_checkpoint),
        ("curve", "evaluate", lambda run, **more: checkpoint_curve(run, [0.1], "fgsm", **more)),
        (
            "growth",
            "perturbation_growth",
            lambda run, **more: checkpoint_growth(run, "fgsm", **more),
        ),
    ],
)
def test_networks_are_measured_in_float32(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    measuring: str,
    measure: Callable[..., Any],
) -> None:
    place = importlib.import_module(f"ssp_fused.adversarial.{module}")
    real, seen = getattr(place, measuring), []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*args, **more)

    monkeypatch.setattr(place, measuring, watched)
    with torch.autocast("cpu", torch.bfloat16):
        measure(trained, settings=EvaluationSettings(limit=8, device="cpu"))
    assert seen and not any(seen)
