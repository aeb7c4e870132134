"""SSP blocks as a PyTorch user writes them: the baseline, and in fp64 the truth.

Parameters and buffers have the names of ``ssp_fused.nn.SSPBlock``'s, so that one state_dict fits both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssp_fused import schemes


class PlainBlock(nn.Module):
    """One step of a scheme, module by module, without needless passes: no product with 1, one sum u + F(u) for both.

    Args:
        channels: Input and output are ``[N, channels, H, W]``.
        scheme: A name in ``ssp_fused.schemes``.
    """

    def __init__(self, channels: int, scheme: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.act1: nn.Module = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act2: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scheme = schemes.get(scheme)

    def branch(self, u: Tensor) -> Tensor:
        """F(u)."""
        z = self.act1(self.norm1(u))
        return self.conv2(self.act2(self.norm2(self.conv1(z))))

    def forward(self, x: Tensor) -> Tensor:
        stages, slopes = [x], []
        for alpha, beta in zip(self.scheme.alpha, self.scheme.beta, strict=True):
            slopes.append(self.branch(stages[-1]))
            stages.append(_weighted_sum(_operands(stages, slopes, alpha, beta)))
        return stages[-1]


def _operands(
    stages: list[Tensor], slopes: list[Tensor], alpha: tuple[float, ...], beta: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """Coefficient and tensor of each operand: a u and F(u) of one coefficient are one."""
    for u, slope, a, b in zip(stages, slopes, alpha, beta, strict=True):
        if a == b != 0:
            yield a, u + slope
            continue
        if a != 0:
            yield a, u
        if b != 0:
            yield b, slope


def _weighted_sum(operands: Iterator[tuple[float, Tensor]]) -> Tensor:
    c, total = next(operands)
    if c != 1:
        total = c * total
    for c, term in operands:
        total = torch.add(total, term, alpha=c)
    return total


def plain_stack(channels: int, scheme: str, blocks: int) -> nn.Sequential:
    """``blocks`` of them in a row."""
    return nn.Sequential(*(PlainBlock(channels, scheme) for _ in range(blocks)))


class RecordedSigns:
    """As a context manager: notes y > 0 for every activation of a plain stack, in the order of evaluation."""

    def __init__(self, network: nn.Sequential) -> None:
        self._network = network
        self.signs: list[Tensor] = []

    def __enter__(self) -> RecordedSigns:
        self._handles = [
            act.register_forward_hook(lambda _module, _inputs, z: self.signs.append(z > 0))
            for block in self._network
            for act in (block.act1, block.act2)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class GivenSigns(nn.Module):
    """ReLU whose gradient takes another run's signs, in their order.

    Attributes:
        nearest: The smallest \\|y\\| that it saw.
    """

    def __init__(self, signs: list[Tensor] | None) -> None:
        super().__init__()
        self._signs = None if signs is None else iter(signs)
        self.nearest = float("inf")

    def forward(self, y: Tensor) -> Tensor:
        z = F.relu(y)
        if y.numel():
            self.nearest = min(self.nearest, y.detach().abs().min().item())
        if self._signs is None:
            return z
        linear = y * next(self._signs)
        return z.detach() + linear - linear.detach()


def truth_stack(
    channels: int, scheme: str, blocks: int, signs: list[Tensor] | None
) -> tuple[nn.Sequential, GivenSigns]:
    """A plain stack in fp64 with :class:`GivenSigns` for every activation."""
    network = plain_stack(channels, scheme, blocks).double()
    act = GivenSigns(signs)
    for block in network:
        block.act1 = block.act2 = act
    return network, act
