"""Samples that are attacked no further than to their misclassification."""

import pytest
import torch
from torch import Tensor, nn

from ssp_fused.adversarial import pgd, pgd_loss

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 4, "random_start": False}


class Line(nn.Module):
    """Label 1 above 0.5, by each sample's one pixel; notes how large its batches are."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        side = x.flatten(1) - 0.5
        return torch.cat([-side, side], dim=1).double()


def images(*pixels: float) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float64).view(-1, 1, 1, 1)


def test_each_sample_stops_where_it_is_first_misclassified() -> None:
    model = Line()
    # Misclassified from the start, after one step, after three, and never.
    x = images(0.4, 0.53, 0.63, 0.9)
    y = torch.ones(4, dtype=torch.int64)
    x_adv = pgd(model, x, y, **ATTACK, early_stop=True)
    torch.testing.assert_close(x_adv, images(0.4, 0.48, 0.48, 0.7))
    assert model.sizes == [4, 3, 2, 2]
    model.sizes.clear()
    everywhere = pgd(model, x, y, **ATTACK)
    torch.testing.assert_close(everywhere, images(0.2, 0.33, 0.43, 0.7))
    assert model.sizes == [4] * 4
    assert torch.equal(x_adv[3], everywhere[3])


def test_the_attack_ends_when_no_sample_is_left() -> None:
    model = Line()
    x, y = images(0.4, 0.3), torch.ones(2, dtype=torch.int64)
    assert torch.equal(pgd(model, x, y, **ATTACK, early_stop=True), x)
    assert model.sizes == [2]


def test_restarts_stop_one_by_one() -> None:
    x, y = images(0.53, 0.9), torch.ones(2, dtype=torch.int64)
    settings = {**ATTACK, "random_start": True, "restarts": 3, "early_stop": True}
    x_adv = pgd(Line(), x, y, **settings)
    assert x_adv[0] < 0.5 and x_adv[1] > 0.5
    assert (x_adv - x).abs().max() <= 0.2 + 1e-12


def test_the_training_loss_is_that_of_where_they_stopped() -> None:
    x = images(0.4, 0.53, 0.63, 0.9)
    y = torch.ones(4, dtype=torch.int64)
    stopped, _ = pgd_loss(Line(), x, y, **ATTACK, early_stop=True)
    logits = Line()(images(0.4, 0.48, 0.48, 0.7))
    torch.testing.assert_close(stopped, nn.functional.cross_entropy(logits, y))


def test_coupled_samples_cannot_stop() -> None:
    with pytest.raises(ValueError, match="early_stop must go with bn_mode 'eval'"):
        pgd(
            Line(),
            images(0.4),
            torch.ones(1, dtype=torch.int64),
            **ATTACK,
            early_stop=True,
            bn_mode="train",
        )
