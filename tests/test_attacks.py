"""Attacks: what they compute, what they leave alone, what they refuse."""

import math

import pytest
import torch
from attacked import assert_same, mixed_state, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from ssp_fused import data, models
from ssp_fused.adversarial import evaluate, fgsm, margin_per_sample, pgd, train_epoch
from ssp_fused.adversarial.ascent import Steps
from ssp_fused.adversarial.attacks import l2_noise
from ssp_fused.adversarial.losses import clean_loss

EPS = {"linf": 0.1, "l2": 0.7}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=4, in_channels=1)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    # Some pixels at the ends of the range, where clipping matters.
    x = ((x - 0.5) * 1.5 + 0.5).clamp(0, 1)
    return x, torch.arange(count) % 10


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that classifies digits well and is not robust, and test images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    splits = data.load("digits")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(4):
        train_epoch(model, splits.train.batches(64, shuffle_seed=epoch), optimizer, clean_loss)
    x, y = next(splits.test.batches(300))
    assert evaluate(model, [(x, y)])["clean"] > 0.95
    return model.eval(), x, y


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_the_ball_and_leaves_the_model_alone(norm, loss, restarts, bn_mode) -> None:
    model = mixed_state(small_network())
    x, y = batch()
    before, original = snapshot(model), x.clone()
    x_adv = pgd(
        model,
        x,
        y,
        eps=EPS[norm],
        step_size=EPS[norm] / 2,
        steps=4,
        norm=norm,
        loss=loss,
        restarts=restarts,
        bn_mode=bn_mode,
    )
    assert_same(before, snapshot(model), buffers=bn_mode == "eval")
    assert torch.equal(x, original)
    assert x_adv.data_ptr() != x.data_ptr()
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    delta = (x_adv.double() - x.double()).flatten(1)
    ulp = torch.finfo(torch.float32).eps
    if norm == "linf":
        assert delta.abs().max() <= EPS[norm] + ulp
        # Many pixels get to the border of the ball: the attack went somewhere.
        assert (delta.abs() > 0.99 * EPS[norm]).double().mean() > 0.3
    else:
        assert delta.norm(dim=1).max() <= EPS[norm] * (1 + 4 * ulp)
        assert delta.norm(dim=1).median() > 0.5 * EPS[norm]


class Watch(nn.Module):
    """Keeps what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.given = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return self.model(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_random_points_of_the_ball_within_the_bounds(norm: str) -> None:
    model = Watch(small_network().eval())
    x, y = batch()
    pgd(model, x, y, eps=EPS[norm], step_size=0.01, steps=1, norm=norm, restarts=2)
    starts = model.given[0]
    assert starts.min() >= 0 and starts.max() <= 1
    delta = (starts - torch.cat([x, x])).flatten(1)
    length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert length.max() <= EPS[norm] + 1e-6 and length.min() > 0.5 * EPS[norm]
    assert not torch.equal(delta[:6], delta[6:])


class FailsAt(nn.Module):
    """Raises in its n-th forward pass."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.model, self.left = model, n

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.model(x)


def test_an_exception_leaves_the_model_alone() -> None:
    model = FailsAt(mixed_state(small_network()), 3)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        pgd(model, *batch(), eps=0.1, step_size=0.02, steps=5)
    assert_same(before, snapshot(model))

    def broken(logits: Tensor, y: Tensor) -> Tensor:
        raise ArithmeticError("broken loss")

    with pytest.raises(ArithmeticError):
        pgd(model, *batch(), eps=0.1, step_size=0.02, steps=5, loss=broken)
    assert_same(before, snapshot(model))


class Probe(nn.Module):
    """Notes how the model stands in each forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in self.parameters())
        modes = {m.training for m in self.modules()}
        self.seen.append((len(x), frozen, modes))
        return self.model(x)


def test_parameters_are_frozen_and_restarts_are_one_batch() -> None:
    model = Probe(small_network().train())
    x, y = batch()
    pgd(model, x, y, eps=0.1, step_size=0.02, steps=2, restarts=3)
    assert model.seen == [(18, True, {False})] * 3
    model.seen.clear()
    pgd(model, x, y, eps=0.1, step_size=0.02, steps=2, restarts=3, bn_mode="train")
    assert model.seen == [(6, True, {True})] * 9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_agrees_with_a_plain_loop(norm: str) -> None:
    model = small_network().double().eval()
    x, y = batch()
    x = x.double()
    eps, step_size = EPS[norm], EPS[norm] / 3
    expected = x.clone()
    for _ in range(5):
        leaf = expected.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        if norm == "linf":
            delta = (expected + step_size * grad.sign() - x).clamp(-eps, eps)
        else:
            unit = grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = expected + step_size * unit - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta * (eps / length).clamp(max=1)
        expected = (x + delta).clamp(0, 1)
    x_adv = pgd(model, x, y, eps=eps, step_size=step_size, steps=5, norm=norm, random_start=False)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


def test_fgsm_is_one_signed_step() -> None:
    model = small_network().eval()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    expected = (x + 0.1 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, x, y, eps=0.1), expected)
    halved = fgsm(model, x, y, eps=0.1, step_size=0.05)
    torch.testing.assert_close(halved, (x + 0.05 * grad.sign()).clamp(0, 1))


def test_margin_loss() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, -1.0], [0.0, 0.0, 5.0]])
    y = torch.tensor([0, 0, 2])
    assert margin_per_sample(logits, y).tolist() == [2.0, -4.0, -5.0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_strength_on_a_trained_network(trained, norm: str) -> None:
    model, x, y = trained
    eps = {"linf": 0.1, "l2": 0.8}[norm]
    settings = {"eps": eps, "norm": norm}

    def accuracy(x_adv: Tensor) -> float:
        return (model(x_adv).argmax(dim=1) == y).float().mean().item()

    clean = accuracy(x)
    noise = x + eps * torch.randn_like(x).sign() * (1 if norm == "linf" else 1 / 8)
    one_step = accuracy(fgsm(model, x, y, **settings))
    many = accuracy(pgd(model, x, y, step_size=eps / 4, steps=10, **settings))
    margin = accuracy(pgd(model, x, y, step_size=eps / 4, steps=10, loss="margin", **settings))
    assert accuracy(noise.clamp(0, 1)) > one_step + 0.1
    assert clean > one_step + 0.2
    assert many <= one_step
    assert margin <= one_step


def test_restarts_are_never_weaker(trained) -> None:
    model, x, y = trained
    x, y = x[:100], y[:100]
    settings = {"eps": 0.06, "step_size": 0.02, "steps": 2, "loss": "margin"}

    def run(restarts: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        x_adv = pgd(model, x, y, restarts=restarts, generator=generator, **settings)
        logits = model(x_adv).detach()
        return margin_per_sample(logits, y), logits.argmax(dim=1) != y

    (one, fooled_one), (four, fooled_four) = run(1), run(4)
    # The first start is the same, so no sample may come out better for the defender.
    assert (four >= one - 1e-4).all()
    assert (four > one + 1e-3).any()
    assert not (fooled_one & ~fooled_four).any()


def test_misclassified_counts_before_a_larger_loss() -> None:
    """Cross-entropy can be larger on an example that is still classified correctly."""

    class Table(nn.Module):
        """Logits by the sign of the first pixel's change; both parts are linear in x."""

        def forward(self, x: Tensor) -> Tensor:
            up = x[:, 0, 0, :1] > 0.5
            correct = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0])
            fooled = torch.tensor([1.0, 1.1, -9.0, -9.0, -9.0])
            return torch.where(up, fooled, correct) + 0 * x.flatten(1).sum(1, keepdim=True)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    losses = {value: F.cross_entropy(Table()(x + value), y) for value in (-0.1, 0.1)}
    assert losses[-0.1] > losses[0.1]
    x_adv = pgd(Table(), x, y, eps=0.2, step_size=0.0, steps=1, restarts=8)
    assert Table()(x_adv).argmax().item() == 1


def test_bn_mode_train_moves_running_statistics_like_the_plain_loop() -> None:
    model, twin = small_network().eval(), small_network().eval()
    x, y = batch()
    pgd(
        model,
        x,
        y,
        eps=0.1,
        step_size=0.03,
        steps=3,
        bn_mode="train",
        random_start=False,
    )
    assert not any(module.training for module in model.modules())
    twin.train()
    expected = x.clone()
    for _ in range(3):
        leaf = expected.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(twin(leaf), y), leaf)
        expected = (expected + 0.03 * grad.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    fresh = small_network()
    for (name, moved), same, start in zip(
        model.named_buffers(), twin.buffers(), fresh.buffers(), strict=True
    ):
        torch.testing.assert_close(moved, same, rtol=1e-4, atol=1e-5)
        if name.endswith("running_mean"):
            assert not torch.equal(moved, start), name
    assert model.block1[0].norm1.num_batches_tracked == 6  # two stages, three steps


def test_generator_and_seed_reproduce() -> None:
    model = small_network().eval()
    x, y = batch()
    settings = {"eps": 0.1, "step_size": 0.01, "steps": 2}
    runs = [
        pgd(model, x, y, generator=torch.Generator().manual_seed(seed), **settings)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    pgd(model, x, y, generator=torch.Generator().manual_seed(3), **settings)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    first = pgd(model, x, y, **settings)
    torch.manual_seed(7)
    assert torch.equal(first, pgd(model, x, y, **settings))


def test_l2_start_is_uniform_in_the_ball() -> None:
    x = torch.zeros(4000, 1, 1, 3)
    noise = l2_noise(x, Steps("l2", 2.0, 0.1, 1, (0, 1)), torch.Generator().manual_seed(0)).flatten(
        1
    )
    radius = noise.norm(dim=1)
    assert radius.max() <= 2.0 * (1 + 1e-6)
    # In three dimensions the cube of the radius is uniform; its mean has deviation 0.005.
    assert ((radius / 2) ** 3).mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.mean(dim=0).abs().max() < 0.08


def test_runs_where_gradients_are_off() -> None:
    model = small_network().eval()
    x, y = batch()
    settings = {"eps": 0.1, "step_size": 0.02, "steps": 2, "random_start": False}
    expected = pgd(model, x, y, **settings)
    with torch.no_grad():
        assert torch.equal(pgd(model, x, y, **settings), expected)
    with torch.inference_mode():
        inner = pgd(model, x.clone(), y.clone(), **settings)
    assert torch.equal(inner, expected) and not inner.is_inference()
    assert torch.equal(pgd(model, x.requires_grad_(), y, **settings), expected)
    assert x.grad is None


def test_autocast_keeps_the_images_in_full_precision() -> None:
    model = small_network().eval()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = pgd(model, x, y, eps=0.1, step_size=0.02, steps=2)
    assert x_adv.dtype == torch.float32
    # Not rounded to bfloat16, as a step in that type would be.
    assert not torch.equal(x_adv, x_adv.bfloat16().float())


def test_callable_loss_sees_one_copy_of_the_batch() -> None:
    # In fp64: near its zero the divergence is lost in fp32's rounding.
    model = small_network().double().eval()
    x, y = batch()
    x = x.double()
    clean = model(x).detach().softmax(dim=1)
    shapes = set()

    def divergence(logits: Tensor, labels: Tensor) -> Tensor:
        shapes.add((tuple(logits.shape), tuple(labels.shape)))
        return F.kl_div(logits.log_softmax(dim=1), clean, reduction="none").sum(dim=1)

    x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=2, restarts=2, loss=divergence)
    assert shapes == {((6, 10), (6,))}
    assert (divergence(model(x_adv), y) > 3 * divergence(model(x), y).abs()).all()


def test_edges() -> None:
    model = small_network().eval()
    x, y = batch()
    same = pgd(model, x, y, eps=0, step_size=0.1, steps=2)
    assert torch.equal(same, x) and same.data_ptr() != x.data_ptr()
    empty = pgd(model, x[:0], y[:0], eps=0.1, step_size=0.1, steps=2, restarts=2)
    assert empty.shape == (0, 1, 8, 8)
    dense = pgd(
        model,
        x.repeat(1, 1, 1, 1).contiguous(memory_format=torch.channels_last),
        y,
        eps=0.1,
        step_size=0.1,
        steps=1,
        restarts=2,
    )
    assert dense.is_contiguous(memory_format=torch.channels_last)
    shifted = pgd(model, x * 4 - 2, y, eps=0.1, step_size=0.1, steps=2, bounds=(-2, 2))
    assert shifted.min() < 0 and shifted.max() > 1
    broken = small_network().eval()
    with torch.no_grad():
        broken.fc.weight.fill_(math.nan)
    assert pgd(broken, x, y, eps=0.1, step_size=0.1, steps=1, restarts=2).shape == x.shape


class WrongShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"eps .*-0\.1"),
        ({"eps": math.nan}, ValueError, "eps .*nan"),
        ({"eps": torch.tensor(0.1)}, TypeError, "eps must be a number, got Tensor"),
        ({"step_size": -1}, ValueError, "step_size .*-1"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1"),
        ({"restarts": 2, "random_start": False}, ValueError, "restarts = 2 needs random_start"),
        ({"bounds": (1, 0)}, ValueError, r"bounds .*low < high, got \(1, 0\)"),
        ({"bounds": (0, 0.5)}, ValueError, r"x must lie within bounds \(0, 0.5\)"),
        ({"norm": "l1"}, ValueError, "norm 'l1'; known: linf, l2"),
        ({"loss": "dlr"}, ValueError, "loss 'dlr'; known: ce, margin"),
        ({"loss": F.cross_entropy}, ValueError, r"loss must return one value .*\(6,\), got \(\)"),
        ({"bn_mode": "batch"}, ValueError, "bn_mode 'batch'; known: eval, train"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, ValueError, r"\(6, 1, 8, 8\) and \(5,\)"),
        ({"y": torch.zeros(6)}, TypeError, "y must be int64, got torch.float32"),
        ({"y": torch.full((6,), 10)}, ValueError, "y .*below num_classes = 10, got 10"),
        ({"y": torch.full((6,), -1)}, ValueError, "y .*-1"),
        ({"x": torch.zeros(6, 1, 8, 8, dtype=torch.uint8)}, TypeError, "x must be floating"),
        ({"x": torch.zeros(6)}, ValueError, "x must be"),
        ({"model": F.relu}, TypeError, "model must be a torch.nn.Module, got function"),
        ({"model": WrongShape()}, ValueError, "model must return logits"),
        ({"x": torch.zeros(6, 1, 8, 8, device="meta")}, ValueError, "y must be on the device"),
    ],
)
def test_bad_input_is_named(change: dict, error: type, message: str) -> None:
    x, y = batch()
    arguments = {"model": small_network().eval(), "x": x, "y": y}
    arguments |= {"eps": 0.1, "step_size": 0.05, "steps": 1} | change
    with pytest.raises(error, match=message):
        pgd(**arguments)
