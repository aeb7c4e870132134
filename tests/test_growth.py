"""Perturbation growth: its definition, which modules, and what is left behind."""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import cli, data, models
from ssp_fused.adversarial import (
    EvaluationSettings,
    TrainConfig,
    checkpoint_growth,
    fit,
    named_attack,
    perturbation_growth,
)
from ssp_fused.nn import SSPBlock, SSPStack


def shift(amount: float) -> Any:
    return lambda model, x, y: x + amount * torch.linspace(-1, 1, x[0].numel()).view_as(x[0])


def batches(count: int = 23, size: int = 10) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in data.load("digits").test.take(count).batches(size)]


def plain_ratios(before: list[Tensor], after: list[Tensor], p: int) -> list[float]:
    """The definition, sample by sample; each list holds the clean and the attacked tensors."""
    ratios = []
    for index in range(len(before[0])):
        moved_in = (before[1][index] - before[0][index]).abs().pow(p).sum().pow(1 / p)
        moved_out = (after[1][index] - after[0][index]).abs().pow(p).sum().pow(1 / p)
        ratios.append((moved_out / moved_in).item())
    return ratios


def of_each(ratio: float) -> dict[str, Any]:
    """What is reported where all samples have the same ratio."""
    same = pytest.approx({"median": ratio, "p90": ratio, "max": ratio})
    return {
        "l1": pytest.approx(ratio),
        "l2": pytest.approx(ratio),
        "quantiles": {"l1": same, "l2": same},
    }


@pytest.mark.parametrize("scheme", ["ssp33", ("adaptive", "euler", "ssp22")])
def test_growth_is_its_definition(scheme: Any) -> None:
    torch.manual_seed(1)
    model = models.sspnet_cifar(scheme, 2, width=4, in_channels=1).double().train()
    model.block2[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    attack = named_attack("pgd-2", eps=0.1, step_size=0.05)
    found = perturbation_growth(model, batches(), attack)
    assert [module.training for module in model.modules()] == modes
    assert list(found) == ["block1", "block2", "block3"]

    attack = named_attack("pgd-2", eps=0.1, step_size=0.05)
    model.eval()
    stages: dict[str, list[list[Tensor]]] = {name: [[], []] for name in found}
    with torch.no_grad():
        pairs = [(x, attack(model, x, y)) for x, y in batches()]
        for images in map(torch.cat, zip(*pairs, strict=True)):
            x = model.conv(model.normalize(images))
            for index, (name, (before, after)) in enumerate(stages.items(), start=1):
                if index > 1:
                    x = model.get_submodule(f"sub{index - 1}")(x)
                before.append(x)
                x = model.get_submodule(name)(x)
                after.append(x)
    for name, (before, after) in stages.items():
        for order, p in (("l1", 1), ("l2", 2)):
            ratios = plain_ratios(before, after, p)
            assert found[name][order] == pytest.approx(statistics.mean(ratios), rel=1e-12)
            quantiles = {
                "median": statistics.median(ratios),
                "p90": statistics.quantiles(ratios, n=10, method="inclusive")[-1],
                "max": max(ratios),
            }
            assert found[name]["quantiles"][order] == pytest.approx(quantiles, rel=1e-12)
        assert (found[name]["samples"], found[name]["left_out"]) == (23, 0)


class InPlace(nn.Module):
    """Writes into its input, and so does what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.group = Doubling()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.group(x.clone())).flatten(1)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(-2.0)


def test_modules_that_write_in_place_are_measured_right() -> None:
    found = perturbation_growth(InPlace(), batches(), shift(0.1), groups=["group"])
    assert found == {"group": {**of_each(2), **counts(23)}}


def counts(samples: int, left_out: int = 0) -> dict[str, int]:
    return {"samples": samples, "left_out": left_out}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = SSPBlock(1, "euler")
        self.body = nn.Sequential(nn.Conv2d(1, 1, 1), SSPStack(SSPStack(block), SSPBlock(1)))
        self.head = SSPStack(SSPBlock(1, "ssp22"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).flatten(1)


def test_groups_are_the_outermost_stacks_or_what_is_named() -> None:
    model = Nested().double()
    assert list(perturbation_growth(model, batches(), shift(0.1))) == ["body.1", "head"]
    stack = SSPStack(SSPBlock(1, "euler")).double()
    assert list(perturbation_growth(stack, batches(), shift(0.1))) == ["model"]
    named = {"first": "body.1.0", "all": "body"}
    found = perturbation_growth(model, batches(), shift(0.1), groups=named)
    assert list(found) == ["first", "all"]
    alone = perturbation_growth(model, batches(), shift(0.1), groups=["body.1.0"])
    assert alone["body.1.0"] == found["first"] != found["all"]


def hooks(model: nn.Module) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_hooks_and_modes_do_not_stay_after_an_error() -> None:
    model = Nested().double().train()

    def failing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x[:, :, :0]

    with pytest.raises(RuntimeError):
        perturbation_growth(model, batches(), failing)
    assert hooks(model) == 0 and all(module.training for module in model.modules())
    perturbation_growth(model, batches(), shift(0.1))
    assert hooks(model) == 0


def test_unchanged_samples_are_left_out_and_nan_is_seen() -> None:
    model = Nested().double()
    (x, y), *_ = batches(10)
    changed = torch.tensor([True] * 6 + [False] * 4)

    def some(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(changed.view(-1, 1, 1, 1), shift(0.1)(model, x, y), x)

    found = perturbation_growth(model, [(x, y)], some)
    expected = perturbation_growth(model, [(x[:6], y[:6])], shift(0.1))
    for name, values in found.items():
        assert (values.pop("samples"), values.pop("left_out")) == (6, 4)
        for order, quantiles in values.pop("quantiles").items():
            assert quantiles == pytest.approx(expected[name]["quantiles"][order])
        assert values == pytest.approx({order: expected[name][order] for order in values})

    def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"))

    seen = perturbation_growth(model, [(x, y)], broken)["head"]
    assert math.isnan(seen["l1"]) and math.isnan(seen["l2"]) and seen["samples"] == 10
    assert math.isnan(seen["quantiles"]["l2"]["median"])
    with pytest.raises(ValueError, match=r"group 'body\.1' saw no change"):
        perturbation_growth(model, [(x, y)], lambda model, x, y: x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group = nn.Identity()
        self.unused = nn.Identity()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.group(self.group(x)))[0].flatten(1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (None, ValueError, "groups must be given: the model has no SSPStack"),
        ([], ValueError, "groups must name a module"),
        (["nope"], ValueError, "no module 'nope'"),
        (
            ["group"],
            ValueError,
            "'group' must be called once in a forward pass, was called 2 times",
        ),
        (["unused"], ValueError, "was called 0 times"),
        (["pair"], TypeError, "'pair' must map a tensor to a tensor, found tuple"),
    ],
)
def test_bad_groups_are_named(groups: Any, error: type[Exception], message: str) -> None:
    model = Twice()
    with pytest.raises(error, match=message):
        perturbation_growth(model, batches(), shift(0.1), groups=groups)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="no batch"):
        perturbation_growth(model, [], shift(0.1), groups=["group"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("growth") / name for name in ("res", "ssp3")]
    sizes = {"blocks": 1, "width": 4, "steps": 1, "epochs": 1, "limit": 64, "batch_size": 32}
    for folder in folders:
        config = TrainConfig(**sizes, model=folder.name, device="cpu", out=str(folder))
        fit(config, progress=False)
    return folders


OPTIONS = ("--attack", "pgd-2", "--limit", "40", "--device", "cpu")


def test_the_command_prints_writes_and_draws(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    figure, out = tmp_path / "growth.png", tmp_path / "growth.json"
    files = ("--figure", str(figure), "--out", str(out))
    assert cli.main(["growth", *map(str, runs), *OPTIONS, *files]) == 0
    table = capsys.readouterr().out
    reports = json.loads(out.read_text())["runs"]
    assert [report["model"] for report in reports] == ["res", "ssp3"]
    for report in reports:
        assert (report["attack"], report["eps"], report["images"]) == ("pgd-2", 0.15, 40)
        for name, values in report["growth"].items():
            largest = (values["quantiles"][order]["max"] for order in ("l1", "l2"))
            numbers = (values["l1"], values["l2"], *largest)
            assert f"{name:<10}" + "".join(f"{number:>9.3f}" for number in numbers) in table
    settings = EvaluationSettings(limit=40, device="cpu")
    assert checkpoint_growth(runs[0], "pgd-2", settings) == reports[0]
    assert "jacobian_norms" not in reports[0]
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "growth.png"]
    assert cli.main(["growth", str(runs[0]), *OPTIONS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": reports[:1]}


def test_what_cannot_be_drawn_or_written_is_said_first(
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "checkpoint_growth", lambda *_, **__: pytest.fail("was measured"))
    for option, name, message in (
        ("--figure", "growth.jpeg", "must end in .png, .pdf, .svg"),
        ("--figure", "missing/growth.png", "--figure: there is no folder"),
        ("--out", "missing/growth.json", "--out: there is no folder"),
        ("--out", "", "--out must be a file, got the folder"),
    ):
        assert cli.main(["growth", str(runs[0]), option, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["growth", str(runs[0]), "--figure", str(tmp_path / "growth.png")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'ssp_fused[plot]'" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
