"""Steps of PGD adversarial training, as published, as a PyTorch user writes them, and with the fused layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssp_fused.adversarial import pgd_loss
from ssp_fused.models import CIFAR_MEAN, CIFAR_STD, Normalize

from .plain import plain_stack

WIDTHS = (16, 32, 64)


class PlainDownsample(nn.Module):
    """The subsampling residual block between two groups; keys as ``ssp_fused.nn.PreActDownsample``'s."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride=2, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(F.relu(self.norm1(x), inplace=True))
        branch = self.conv1(F.relu(self.norm1(x), inplace=True))
        return shortcut + self.conv2(F.relu(self.norm2(branch), inplace=True))


class PlainNet(nn.Module):
    """The published CIFAR network of plain layers; loads the state_dict of ``ssp_fused.models.sspnet_cifar``."""

    def __init__(self, scheme: str, blocks: int) -> None:
        super().__init__()
        self.normalize = Normalize(CIFAR_MEAN, CIFAR_STD)
        self.conv = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        for index, width in enumerate(WIDTHS, start=1):
            if index > 1:
                self.add_module(f"sub{index - 1}", PlainDownsample(width // 2, width))
            self.add_module(f"block{index}", plain_stack(width, scheme, blocks))
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.conv(self.normalize(x)))
        x = self.block2(self.sub1(x))
        x = self.block3(self.sub2(x))
        return self.fc(self.avg(x).flatten(1))


@dataclass(frozen=True)
class Attack:
    """PGD in l-infinity from a random start, pixels in [0, 1]."""

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 7

    def start(self, x: Tensor) -> Tensor:
        return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)

    def step(self, x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        delta = (x_adv + self.step_size * grad.sign() - x).clamp(-self.eps, self.eps)
        return (x + delta).clamp(0, 1)


Loss = Callable[[nn.Module, Tensor, Tensor, Attack], Tensor]


def published_loss(network: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """As the published code: all in training mode, each attack step a whole backward pass."""
    network.train()
    x_adv = attack.start(x)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(network(x_adv), y).backward()
        x_adv = attack.step(x_adv.detach(), x_adv.grad, x)
    network.zero_grad(set_to_none=True)
    return F.cross_entropy(network(x_adv), y)


def frozen_loss(network: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """As a careful user writes it: the attack in evaluation mode, on frozen parameters."""
    network.eval().requires_grad_(False)
    x_adv = attack.start(x)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(network(x_adv), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = attack.step(x_adv.detach(), grad, x)
    network.train().requires_grad_(True)
    return F.cross_entropy(network(x_adv), y)


def fused_loss(
    network: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, graph: bool = False
) -> Tensor:
    """The package's own."""
    network.train()
    settings = {"eps": attack.eps, "step_size": attack.step_size, "steps": attack.steps}
    return pgd_loss(network, x, y, **settings, graph=graph).loss


class Trainer:
    """A network, its optimizer, and a loss: one call is one step of training.

    Args:
        network: what is trained.
        loss: of this module.
        amp: type of autocast, None without.
    """

    def __init__(self, network: nn.Module, loss: Loss, amp: torch.dtype | None = None) -> None:
        self.network = network
        self._loss = loss
        self._amp = amp
        # The published optimizer; the rate is small, so that the weights stay what was checked.
        self._optimizer = torch.optim.SGD(
            network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def __call__(self, x: Tensor, y: Tensor, attack: Attack) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, self._amp, enabled=self._amp is not None):
            loss = self._loss(self.network, x, y, attack)
        loss.backward()
        self._optimizer.step()
