"""Attacks of other libraries: what they do to fused networks, and what they must not do to anything."""

import copy
import logging
import subprocess
import sys
from typing import Any

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

import ssp_fused
from ssp_fused import models, use_backend
from ssp_fused.adversarial import libraries as library_module
from ssp_fused.adversarial import named_attack
from ssp_fused.adversarial.libraries import LIBRARY_ATTACKS, LibraryAttack, check_within

for library in ("pyautoattack", "torchattacks"):
    pytest.importorskip(library, reason=f"{library} is not installed")

FUSED = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        ssp_fused.available_backends()["cpu"] is not None,
        reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
    ),
)
AUTOATTACKS = ("autoattack", "torchattacks-autoattack")


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return trained_network(attacked=True)


def withstood(model: nn.Module, x_adv: Tensor, y: Tensor) -> list[bool]:
    with torch.no_grad():
        return (model(x_adv).argmax(dim=1) == y).tolist()


@pytest.mark.parametrize("backend", [FUSED])
@pytest.mark.parametrize("name", [*LIBRARY_ATTACKS])
def test_backends_agree_on_each_image(
    robust: nn.Module, name: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = four_digits("test", 14)
    found = {}
    for choice in (backend, "reference"):
        attack = LibraryAttack(name, eps=EPS, seed=3, queries=40)
        with use_backend(choice):
            found[choice] = withstood(robust, attack(robust, x, y), y)
        assert not attack.warnings
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert found[backend] == found["reference"]
    clean = withstood(robust, x, y)
    assert 0 < sum(found[backend]) < sum(clean)
    assert all(before for before, after in zip(clean, found[backend], strict=True) if after)


def few_steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Fewer iterations of pyautoattack's APGD and FAB."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_base import FABAttack

    apgd, fab = APGDAttack.__init__, FABAttack.__init__

    def apgd_init(self: Any, *arguments: Any, **options: Any) -> None:
        apgd(self, *arguments, **{**options, "n_iter": count})

    def fab_init(self: Any, *arguments: Any, **options: Any) -> None:
        fab(self, *arguments, **options)
        self.n_iter = count

    monkeypatch.setattr(APGDAttack, "__init__", apgd_init)
    monkeypatch.setattr(FABAttack, "__init__", fab_init)


def untrained(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"width": 4, "in_channels": 1, "num_classes": CLASSES, **changes}
    return models.sspnet_cifar("euler", 1, **arguments)


def test_autoattack_is_no_weaker_than_its_parts(
    robust: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch, 10)
    x, y = four_digits("test", 12)
    whole, *parts = (
        withstood(robust, LibraryAttack(name, eps=EPS, queries=40)(robust, x, y), y)
        for name in ("autoattack", "apgd-ce", "square")
    )
    for part in parts:
        assert all(one for one, other in zip(part, whole, strict=True) if other)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", [*LIBRARY_ATTACKS])
def test_nothing_but_the_images_comes_out(
    robust: nn.Module,
    name: str,
    norm: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    few_steps(monkeypatch, 3)
    eps = {"linf": 0.3, "l2": 2.0}[norm]
    model = mixed_state(copy.deepcopy(robust))
    x, y = four_digits("test", 24 if name == "cw" else 6)  # cw moves what it fools, no other
    traced = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        before, process, original = snapshot(model), process_state(), x.clone()
        x_adv = LibraryAttack(name, eps=eps, norm=norm, seed=1, queries=20)(model, x, y)
        assert process_state() == process
    finally:
        sys.settrace(traced)
    assert_same(before, snapshot(model))
    assert torch.equal(x, original)
    assert x_adv.data_ptr() != x.data_ptr() and not x_adv.requires_grad
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert not torch.equal(x_adv, x)
    check_within(x_adv, x, eps=eps, norm=norm, name=name)
    assert capfd.readouterr().out == ""


class Breaks(nn.Module):
    """Raises in one of its calls."""

    def __init__(self, model: nn.Module, at: int) -> None:
        super().__init__()
        self.model, self.left = model, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("broken")
        return self.model(x)


@pytest.mark.parametrize("at", [1, 8, 20])  # in the count of classes, the checks, the attack
@pytest.mark.parametrize("name", AUTOATTACKS)
def test_an_exception_leaves_everything_alone_too(name: str, at: int) -> None:
    model = Breaks(mixed_state(untrained()), at)
    x, y = four_digits("test", 6)
    before, process = snapshot(model), process_state()
    with pytest.raises(ArithmeticError, match="broken"):
        LibraryAttack(name, eps=0.1, queries=20)(model, x, y)
    assert_same(before, snapshot(model))
    assert process_state() == process
    assert not logging.getLogger("auto-attack").handlers


def test_the_same_seed_finds_the_same(robust: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = four_digits("test", 12)
    few_steps(monkeypatch, 3)
    first, again, other = (
        LibraryAttack("apgd-ce", eps=EPS, seed=seed)(robust, x, y) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    named = named_attack("apgd-ce", eps=EPS, step_size=STEP, seed=1)
    assert torch.equal(named(robust, x, y), first)


def test_attacks_run_in_inference_mode_and_on_nothing(robust: nn.Module) -> None:
    x, y = four_digits("test", 6)
    attack = LibraryAttack("apgd-ce", eps=EPS)
    expected = attack(robust, x, y)
    with torch.inference_mode():
        assert torch.equal(attack(robust, x.clone(), y.clone()), expected)
    assert attack(robust, x[:0], y[:0]).shape == (0, *x.shape[1:])


class Randomized(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


class Dynamic(nn.Module):
    """Takes a gradient in its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.model(leaf).sum(), leaf)
        return self.model(x + 0 * grad)


@pytest.mark.parametrize(("wrapper", "word"), [(Randomized, "randomized"), (Dynamic, "dynamic")])
def test_what_the_library_warns_of_is_kept_and_said(
    robust: nn.Module,
    wrapper: type[nn.Module],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    few_steps(monkeypatch, 3)
    monkeypatch.setattr(library_module, "_said", set())
    x, y = four_digits("test", 6)
    attack = LibraryAttack("apgd-ce", eps=EPS)
    for _ in range(2):
        attack(wrapper(robust), x, y)
    (message,) = (message for message in attack.warnings if word in message)
    assert attack.warnings[message] == 2
    said = [record for record in caplog.records if record.name == "ssp_fused"]
    assert [word in record.getMessage() for record in said].count(True) == 1
    # The library counts such calls in the whole process; another model is not blamed for them.
    plain = LibraryAttack("apgd-ce", eps=EPS)
    plain(robust, x, y)
    assert not plain.warnings


class Below(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) - 64


def test_cw_sees_logits_below_zero(robust: nn.Module) -> None:
    x, y = four_digits("test", 12)
    attack = LibraryAttack("cw", eps=EPS)
    expected, found = attack(robust, x, y), attack(Below(robust), x, y)
    assert ((expected - found).abs() < 1e-3).double().mean() > 0.99
    assert not torch.equal(expected, x)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.1)])
def test_cw_is_projected_onto_the_ball(robust: nn.Module, norm: str, eps: float) -> None:
    x, y = four_digits("test", 24)
    x_adv = LibraryAttack("cw", eps=eps, norm=norm)(robust, x, y)
    moved = (x_adv != x).flatten(1).any(dim=1)
    assert moved.any()
    delta = (x_adv - x)[moved].flatten(1)
    length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert (length > 0.99 * eps).all() and (length < 1.01 * eps).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_outside_the_ball_or_the_range_are_refused(norm: str) -> None:
    x = torch.rand(3, 1, 4, 4).clamp(0.2, 0.8)
    step = torch.zeros_like(x)
    step[1, 0, 0, 0] = 0.1
    check_within(x + step, x, eps=0.1, norm=norm, name="a")
    check_within(x - step, x, eps=0.1, norm=norm, name="a")
    nowhere = torch.where(step > 0, torch.nan, x)
    for bad in (x + 1.001 * step, x - 1.001 * step, nowhere):
        with pytest.raises(RuntimeError, match=f"a returned 1 of 3 images outside the {norm} ball"):
            check_within(bad, x, eps=0.1, norm=norm, name="a")
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for bad, centre in ((low - step / 2, low), (high + step / 2, high)):
        with pytest.raises(RuntimeError, match="returned 1 of 3"):
            check_within(bad, centre, eps=0.1, norm=norm, name="a")


def test_a_library_that_leaves_the_ball_is_caught(
    robust: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyautoattack import AutoAttack

    monkeypatch.setattr(
        AutoAttack, "run_standard_evaluation", lambda _, x, y, **__: ((x + 0.2).clamp(0, 1), y)
    )
    with pytest.raises(RuntimeError, match="autoattack returned 4 of 4 images outside the linf"):
        LibraryAttack("autoattack", eps=0.1)(robust, *four_digits("test", 4))


def test_what_cannot_be_attacked_is_named(robust: nn.Module) -> None:
    x, y = four_digits("test", 4)
    for name in AUTOATTACKS:
        attack = LibraryAttack(name, eps=EPS)
        with pytest.raises(ValueError, match=f"{name} needs a model of at least 4 classes, got 3"):
            attack(untrained(num_classes=3).eval(), x, y.clamp(max=2))
        with pytest.raises(TypeError, match=f"x must be float32 under {name}, got torch.float64"):
            attack(robust, x.double(), y)
        with pytest.raises(TypeError, match=f"model must be float32 under {name}, got torch.bf"):
            attack(untrained().bfloat16(), x, y)
    for name in (*AUTOATTACKS, "square"):
        attack = LibraryAttack(name, eps=EPS, norm="l2")
        with pytest.raises(ValueError, match=f"{name} in l2 needs images of at least 5 x 5 pixels"):
            attack(untrained(), x[..., :4], y)
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        LibraryAttack("square", eps=-1.0)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        LibraryAttack("square", eps=1.0, norm="l1")


@pytest.mark.parametrize("name", [*LIBRARY_ATTACKS])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = LIBRARY_ATTACKS[name][0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"{library} .*pip install --no-deps pyautoattack tor"):
        named_attack(name, eps=EPS, step_size=STEP)


def test_the_package_loads_no_library_by_itself() -> None:
    code = (
        "import sys, ssp_fused.cli; "
        "print([n for n in ('pyautoattack', 'torchattacks', 'scipy') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
