"""Training losses against transcriptions of their papers' formulas, and the settings of each method."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import data, models
from ssp_fused.adversarial import (
    FreeLoss,
    TrainConfig,
    clean_loss,
    fgsm_rs_loss,
    fit,
    load_checkpoint,
    mart_loss,
    n_fgsm_loss,
    pgd,
    pgd_loss,
    replayed,
    trades_loss,
)
from ssp_fused.adversarial.methods import METHODS

EPS, STEP, STEPS = 0.1, 0.04, 3
ATTACK = {"eps": EPS, "step_size": STEP, "steps": STEPS}


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=4, in_channels=1).double().train()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    x, y = next(data.load("digits").train.batches(count))
    return x.double(), y


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_training(model: nn.Module, found: Tensor, twin: nn.Module, expected: Tensor):
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found), gradients(twin, expected))
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def probabilities(logits: Tensor) -> Tensor:
    e = (logits - logits.amax(dim=1, keepdim=True)).exp()
    return e / e.sum(dim=1, keepdim=True)


def nll(logits: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-p[label].log() for p, label in zip(probabilities(logits), y, strict=True)])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=1)


def ascent(model: nn.Module, start: Tensor, x: Tensor, objective, step: float, steps: int):
    """Signed ascent in eval mode, projected on the ball and the pixel range."""
    model.eval()
    x_adv = start.clamp(0, 1)
    for _ in range(steps):
        leaf = x_adv.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(model(leaf)).sum(), leaf)
        x_adv = torch.min(torch.max(x_adv + step * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return x_adv.detach()


def test_trades_is_the_papers_formula() -> None:
    model, twin = network(), network()
    x, y = batch()
    draws = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    found = trades_loss(model, x, y, **ATTACK, beta=4.0, generator=draws[0])

    twin.eval()
    p = probabilities(twin(x)).detach()
    start = x + 1e-3 * torch.empty_like(x).normal_(generator=draws[1])
    x_adv = ascent(twin, start, x, lambda z: kl(p, probabilities(z)), STEP, STEPS)
    logits, attacked = twin(x), twin(x_adv)
    divergence = kl(probabilities(logits), probabilities(attacked)).mean()
    assert divergence > 0
    expected = nll(logits, y).mean() + 4.0 * divergence
    torch.testing.assert_close(found.logits, attacked.detach())
    assert_same_training(model, found.loss, twin, expected)


def test_mart_is_the_papers_formula() -> None:
    model, twin = network(), network()
    x, y = batch()
    draws = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    found = mart_loss(model, x, y, **ATTACK, beta=3.0, generator=draws[0])

    start = x + torch.empty_like(x).uniform_(-EPS, EPS, generator=draws[1])
    x_adv = ascent(twin, start, x, lambda z: nll(z, y), STEP, STEPS)
    p, q = probabilities(twin(x)), probabilities(twin(x_adv))
    rows = torch.arange(len(y))
    others = q.detach().clone()
    others[rows, y] = -1
    k = others.argmax(dim=1)
    bce = -q[rows, y].log() - (1 - q[rows, k]).log()
    expected = (bce + 3.0 * kl(p, q) * (1 - p[rows, y])).mean()
    assert_same_training(model, found.loss, twin, expected)


def test_mart_is_exact_where_the_network_is_sure_and_wrong() -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :1] * torch.tensor([80.0, -80.0, 0.0])

    x, y = torch.ones(2, 1, 1, 1), torch.tensor([1, 0])
    loss = mart_loss(Sure(), x, y, eps=0, step_size=0, steps=1, beta=0.0).loss
    # Wrong: -log p_1 = 160, -log(1 - p_0) = 80. Right: both are zero.
    assert loss.item() == pytest.approx((160 + 80) / 2)


def test_fgsm_rs_is_the_papers_algorithm() -> None:
    model, twin = network(), network()
    x, y = batch()
    draws = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    found = fgsm_rs_loss(model, x, y, eps=EPS, generator=draws[0])

    start = x + torch.empty_like(x).uniform_(-EPS, EPS, generator=draws[1])
    x_adv = ascent(twin, start, x, lambda z: nll(z, y), 1.25 * EPS, 1)
    assert_same_training(model, found.loss, twin, nll(twin(x_adv), y).mean())
    # In-step clipping: a step of 1.25 eps brings most pixels to the ball's border, none beyond it.
    inside = (x > EPS) & (x < 1 - EPS)
    assert ((x_adv - x).abs() <= EPS + 1e-12).all()
    assert ((x_adv - x).abs()[inside] > 0.99 * EPS).double().mean() > 0.5


def test_n_fgsm_is_the_papers_algorithm() -> None:
    model, twin = network(), network()
    x, y = batch()
    draws = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    found = n_fgsm_loss(model, x, y, eps=EPS, noise=2.0, generator=draws[0])

    noisy = (x + torch.empty_like(x).uniform_(-2 * EPS, 2 * EPS, generator=draws[1])).clamp(0, 1)
    twin.eval()
    leaf = noisy.clone().requires_grad_()
    (g,) = torch.autograd.grad(nll(twin(leaf), y).sum(), leaf)
    twin.train()
    x_adv = (noisy + EPS * g.sign()).clamp(0, 1)
    assert ((x_adv - x).abs() > 2 * EPS).any()
    assert_same_training(model, found.loss, twin, nll(twin(x_adv), y).mean())


def test_free_shares_one_backward_between_parameters_and_perturbation() -> None:
    model, twin = network(), network()
    x, y = batch(12)
    # The last batch is smaller: it moves the first rows only.
    batches = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    free = FreeLoss(eps=EPS, step_size=0.07)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    delta = torch.zeros_like(x[:5])
    for images, labels in replayed(batches, 3):
        optimizers[0].zero_grad()
        loss = free(model, images, labels).loss
        loss.backward()
        optimizers[0].step()

        leaf = delta[: len(images)].clone().requires_grad_()
        optimizers[1].zero_grad()
        expected = nll(twin((images + leaf).clamp(0, 1)), labels).mean()
        expected.backward()
        optimizers[1].step()
        rows = delta[: len(images)]
        rows += 0.07 * leaf.grad.sign()
        rows.clamp_(-EPS, EPS)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(free.perturbation, delta)
    for found, p in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, p)
    assert delta.abs().max() == EPS and (delta.abs() < EPS).any()
    other = FreeLoss(eps=EPS)
    other.load_state_dict(free.state_dict())
    assert torch.equal(other.perturbation, free.perturbation)


def test_free_keeps_what_has_no_finite_gradient() -> None:
    model = network()
    x, y = batch(2)
    free = FreeLoss(eps=EPS)
    free(model, x, y).loss.backward()
    before = free.perturbation.clone()
    (free(model, x, y).loss * math.nan).backward()
    assert torch.equal(free.perturbation, before)


@pytest.mark.parametrize("start", [0, 2])
def test_replayed(start: int) -> None:
    assert list(replayed("ab", 3, start)) == ["a"] * (3 - start) + ["b"] * 3


def test_label_smoothing_mixes_the_target_with_all_classes() -> None:
    x, y = batch()
    for loss, attack in ((clean_loss, {}), (pgd_loss, {**ATTACK, "random_start": False})):
        model, twin = network(), network()
        found = loss(model, x, y, label_smoothing=0.3, **attack)
        # The attack climbs the cross-entropy as it is.
        images = pgd(twin, x, y, **attack) if attack else x
        log_p = probabilities(twin(images)).log()
        target = 0.7 * nn.functional.one_hot(y, 10) + 0.3 / 10
        assert_same_training(model, found.loss, twin, -(target * log_p).sum(dim=1).mean())


LOSSES = {
    "trades": partial(trades_loss, **ATTACK),
    "mart": partial(mart_loss, **ATTACK),
    "fgsm-rs": partial(fgsm_rs_loss, eps=EPS),
    "n-fgsm": partial(n_fgsm_loss, eps=EPS),
    "free": FreeLoss(eps=EPS),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bad_input_is_named(loss) -> None:
    x, y = batch()
    with pytest.raises(TypeError, match="y must be int64"):
        loss(network(), x, y.float())
    with pytest.raises(ValueError, match=r"x must lie within bounds \(0.0, 1.0\)"):
        loss(network(), x + 1, y)
    if not isinstance(loss, FreeLoss):
        with pytest.raises(ValueError, match="bn_mode 'both'; known: eval, train"):
            loss(network(), x, y, bn_mode="both")
        with pytest.raises(ValueError, match="graph must go with images on a cuda device, got cpu"):
            loss(network(), x, y, graph=True)
    with pytest.raises(ValueError, match=r"noise must be .*-1"):
        n_fgsm_loss(network(), x, y, eps=EPS, noise=-1)
    with pytest.raises(ValueError, match=r"eps must be .*-1"):
        FreeLoss(eps=-1)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_attacks_leave_the_model_alone(loss) -> None:
    model = network()
    model.block2[0].norm1.eval()
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = [p.detach().clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    loss(model, *batch())
    assert all(map(torch.equal, model.parameters(), before))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.bias"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert [module.training for module in model.modules()] == modes
    passes = 2 if loss in (LOSSES["trades"], LOSSES["mart"]) else 1
    assert model.block1[0].norm1.num_batches_tracked == 2 * passes
    assert model.block2[0].norm1.num_batches_tracked == 0


def config(out: Path, **changes) -> TrainConfig:
    small = {"blocks": 1, "width": 4, "epochs": 1, "batch_size": 32, "limit": 64, "steps": 1}
    return TrainConfig(**{"device": "cpu", "out": str(out), **small, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    result = fit(config(tmp_path, method=method, lr=0.01), progress=False)
    assert math.isfinite(result["last"]["train_loss"])
    assert ("val_robust" in result["last"]) == (method != "none")
    saved = load_checkpoint(tmp_path / "last.pt")[1]
    assert (saved.alpha is None) == (method not in ("fgsm-rs", "n-fgsm", "free"))
    steps = 2 * (8 if method == "free" else 1)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["training"]
    assert state["scheduler"]["last_epoch"] == steps


def test_methods_have_their_papers_defaults() -> None:
    def resolved(method: str) -> TrainConfig:
        return TrainConfig(data="cifar10", method=method).resolved()

    assert resolved("trades").beta == 6 and resolved("mart").beta == 5
    assert resolved("fgsm-rs").alpha == pytest.approx(10 / 255)
    assert resolved("n-fgsm").alpha == resolved("free").alpha == pytest.approx(8 / 255)
    assert resolved("n-fgsm").noise == 2 and resolved("free").replays == 8
    assert resolved("pgd").beta is None and resolved("pgd").replays is None
    given = TrainConfig(method="n-fgsm", alpha=0.02, noise=1.0).resolved()
    assert (given.alpha, given.noise) == (0.02, 1.0) and given.resolved() == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.0}, "beta must be left out with method 'pgd', got 1.0"),
        ({"method": "trades", "alpha": 0.1}, "alpha must be left out with method 'trades'"),
        ({"method": "mart", "label_smoothing": 0.1}, "label_smoothing must be left out"),
        ({"method": "free", "bn_mode": "train"}, "bn_mode must be left out with method 'free'"),
        ({"method": "none", "graph": True}, "graph must be left out with method 'none'"),
        ({"method": "trades", "early_stop": True}, "early_stop must be left out"),
        ({"method": "free", "replays": 0}, "replays must be at least 1, got 0"),
        ({"method": "free", "accumulate": 2}, "accumulate must be 1 with method 'free', got 2"),
        ({"method": "trades", "beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"graph": True}, "graph must go with a cuda device, got 'cpu'"),
        ({"early_stop": True, "bn_mode": "train"}, "early_stop must go with bn_mode 'eval'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"bn_mode": "batch"}, "bn_mode 'batch'; known: eval, train"),
    ],
)
def test_settings_that_do_not_fit_the_method(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change).resolved()
