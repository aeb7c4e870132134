"""PGD against torchattacks' at equal settings, on a network that PGD training made."""

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import data, models
from ssp_fused.adversarial import pgd, pgd_loss, train_epoch

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")

EPS, STEP, STEPS = 0.15, 0.04, 10


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = models.sspnet_cifar("ssp22", 1, width=8, in_channels=1)
    splits = data.load("digits")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def loss(model: nn.Module, x: Tensor, y: Tensor):
        return pgd_loss(model, x, y, eps=EPS, step_size=2 * STEP, steps=3)

    for epoch in range(4):
        train_epoch(model, splits.train.batches(64, shuffle_seed=epoch), optimizer, loss)
    x, y = next(splits.test.batches(450))
    return model.eval(), x, y


@pytest.mark.parametrize("random_start", [False, True])
def test_robust_accuracy_is_torchattacks_pgds(trained, random_start: bool) -> None:
    model, x, y = trained
    settings = {"eps": EPS, "steps": STEPS, "random_start": random_start}
    torch.manual_seed(1)
    ours = pgd(model, x, y, step_size=STEP, **settings)
    torch.manual_seed(1)
    theirs = torchattacks.PGD(model, alpha=STEP, **settings)(x, y)
    with torch.no_grad():
        clean, found, expected = (
            (model(images).argmax(dim=1) == y).double().mean().item()
            for images in (x, ours, theirs)
        )
    assert 0.2 < expected < clean - 0.1
    assert found == pytest.approx(expected, abs=0.005)
    # Nearly all steps are the same; where a gradient is all but zero, its sign may be another.
    assert ((ours - theirs).abs() < 1e-6).double().mean() > 0.98
    assert_within(ours, x, EPS)


def assert_within(x_adv: Tensor, x: Tensor, eps: float) -> None:
    """Within the ball to one unit in the last place, and within the pixel range exactly."""
    largest = torch.maximum(x_adv, x).clamp(min=eps)
    ulp = torch.nextafter(largest, largest + 1) - largest
    beyond = (x_adv.double() - x.double()).abs() - eps
    assert (beyond <= ulp.double()).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
