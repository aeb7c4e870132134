"""Checks for gradient masking: what they flag, and what they do not."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from attacked import (
    CLASSES,
    EPS,
    STEP,
    assert_same,
    four_digits,
    mixed_state,
    process_state,
    snapshot,
    trained_network,
)
from torch import Tensor, nn

from ssp_fused.adversarial import MaskingChecks
from ssp_fused.adversarial import masking as masking_module
from ssp_fused.adversarial.masking import PASSED, SUSPICIOUS

CHECKS = MaskingChecks(num_classes=CLASSES, eps=EPS, step_size=STEP)
COUNT = 24


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return trained_network(attacked=False)


def flagged(report: dict) -> set[str]:
    assert report == json.loads(json.dumps(report))
    found = {n for n, check in report["checks"].items() if check["verdict"] == SUSPICIOUS}
    assert report["suspicious"] == bool(found)
    return found


def needs_square() -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")


@pytest.mark.parametrize(
    ("attacked", "norm", "sizes"), [(False, "l2", 24), (False, "linf", 24), (True, "linf", 14)]
)
def test_trained_networks_pass(attacked: bool, norm: str, sizes: int) -> None:
    model = trained_network(attacked=attacked)
    checks = CHECKS if norm == "linf" else MaskingChecks(CLASSES, 0.6, 0.15, norm="l2", seed=1)
    x, y = four_digits("test", COUNT)
    report = checks.run(model, zip(x.split(sizes), y.split(sizes), strict=True))
    assert flagged(report) == set()
    assert report["images"] == COUNT
    assert list(report["checks"]) == ["radius", "steps", "single step", "black box", "gradients"]
    assert [*report["checks"]["radius"]["accuracy"].values()][-1] == 0


class Scaled(nn.Module):
    """Logits so far apart that the softmax is exactly 0 or 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1e4


class Rounded(nn.Module):
    """A function with no slope before the network, or behind its first convolution."""

    def __init__(self, model: nn.Module, *, inside: bool) -> None:
        super().__init__()
        self.model, self.inside = model, inside

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            return self.model((x * 8).round() / 8)
        return self.model[1:]((self.model[0](x) * 8).round() / 8)


@pytest.mark.parametrize(
    "masked",
    [Scaled, lambda model: Rounded(model, inside=False), lambda model: Rounded(model, inside=True)],
    ids=["scaled logits", "rounded input", "rounded activations"],
)
def test_masked_networks_are_flagged(plain: nn.Module, masked: Callable) -> None:
    needs_square()
    x, y = four_digits("test", COUNT)
    report = CHECKS.run(masked(plain), [(x, y)])
    assert {"gradients", "black box"} <= flagged(report)
    gradients = report["checks"]["gradients"]
    assert gradients["zero"] > 0.9 * COUNT and gradients["non_finite"] == 0


class Shattered(nn.Module):
    """A slope that has nothing to do with the function: what gradients find is chance."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator)
        held = x.detach()
        return self.model(held) + (noise * (x - held)).sum(dim=(1, 2, 3)).unsqueeze(
            1
        ) * torch.tensor([1.0, -1.0, 1.0, -1.0])


def test_slopes_that_lead_nowhere_are_flagged(plain: nn.Module) -> None:
    needs_square()
    report = CHECKS.run(Shattered(plain), [four_digits("test", 2 * COUNT)])
    assert "black box" in flagged(report)
    assert report["checks"]["gradients"]["verdict"] == PASSED


def test_non_finite_gradients_are_flagged(plain: nn.Module) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x) + (x - x.detach()).abs().sqrt().sum(dim=(1, 2, 3)).unsqueeze(1)

    report = CHECKS.run(Root(), [four_digits("test", 12)])
    assert "gradients" in flagged(report)
    assert report["checks"]["gradients"]["non_finite"] == 12


def test_a_gradient_is_zero_where_no_pixel_has_one(plain: nn.Module) -> None:
    x, y = four_digits("test", 3)
    inner = torch.zeros(1, 1, 8, 8)
    inner[..., 2:6, 2:6] = 1

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(torch.cat([x[:1] * inner, x[1:2] * 0, x[2:]]))

    found = masking_module._input_gradients(Inner(), x, y)
    assert found["zero gradient"].tolist() == [False, True, False]
    assert not found["non-finite gradient"].any()


def test_a_difference_counts_where_chance_does_not_explain_it() -> None:
    def fallen(alone: int, other_alone: int, both: int = 5) -> tuple[Tensor, Tensor]:
        one = torch.tensor([False] * alone + [True] * other_alone + [False] * both)
        other = torch.tensor([True] * alone + [False] * other_alone + [False] * both)
        return one, other

    def stronger(*counts: int) -> bool:
        found, *alone = masking_module._stronger(*fallen(*counts))
        assert tuple(alone) == counts
        return found

    assert stronger(7, 0) and not stronger(6, 0)
    assert not stronger(0, 0) and not stronger(0, 7) and not stronger(5, 5)
    # 2^-20 (1 + 20 + 190 + 1140 + 4845) is 0.0059, with 15504 more 0.0207.
    assert stronger(16, 4) and not stronger(15, 5)


def test_each_comparison_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks of which the one that should be weaker is the stronger."""
    needs_square()
    withstood = torch.tensor([True] * 20)
    names = {"fgsm": "single step", "pgd-10": "steps", "square": "black box"}
    for stronger, check in names.items():
        found = {"clean": withstood, "zero gradient": ~withstood, "non-finite gradient": ~withstood}
        found |= {name: withstood.clone() for name in (*names, "pgd-100")}
        found |= {"radius 0.1": withstood, "radius 1": ~withstood}
        found[stronger][:7] = False
        monkeypatch.setattr(masking_module, "dealt", lambda *_, found=found: found)
        assert flagged(CHECKS.run(nn.Identity(), [])) == {check}


@pytest.mark.parametrize(
    ("accuracies", "suspicious"),
    [((20, 10, 0), False), ((20, 10, 5), False), ((20, 10, 6), True), ((20, 10, 17, 0), True)],
)
def test_accuracy_has_to_fall_to_chance_with_the_radius(
    accuracies: tuple[int, ...], suspicious: bool
) -> None:
    found = {
        f"radius {radius}": torch.arange(20) < right for radius, right in enumerate(accuracies)
    }
    assert (CHECKS._radius(found)["verdict"] == SUSPICIOUS) == suspicious


def test_radii_reach_every_image() -> None:
    x = torch.zeros(1, 3, 4, 4)
    assert MaskingChecks(4, 0.2, 0.1)._radii(x) == [0.1, 0.2, 0.4, 1.0]
    assert MaskingChecks(4, 2.0, 0.1, norm="l2")._radii(x) == [1.0, 2.0, 4.0, 48**0.5]
    assert MaskingChecks(4, 0.0, 0.1)._radii(x) == [1.0]


def test_the_model_is_left_alone(plain: nn.Module) -> None:
    model = mixed_state(trained_network(attacked=False))
    before, process = snapshot(model), process_state()
    CHECKS.run(model, [four_digits("test", 4)])
    assert_same(before, snapshot(model))
    assert process_state() == process


def test_without_the_library_one_check_is_not_run(
    plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    report = CHECKS.run(plain, [four_digits("test", 8)])
    check = report["checks"].pop("black box")
    assert check["verdict"] == "not run" and "pip install --no-deps pyautoattack" in check["seen"]
    assert {other["verdict"] for other in report["checks"].values()} == {PASSED}


def test_images_too_small_for_the_square_attack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    checks = MaskingChecks(CLASSES, 0.6, 0.15, norm="l2")
    report = checks.run(model, [(torch.rand(4, 1, 4, 4), torch.arange(4))])
    assert report["checks"]["black box"]["verdict"] == "not run"


def test_no_images_are_refused(plain: nn.Module) -> None:
    with pytest.raises(ValueError, match="no batch was seen"):
        CHECKS.run(plain, [])
