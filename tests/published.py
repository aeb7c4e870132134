"""A double of the published networks: their class, attribute and state_dict names, written in plain PyTorch.

What ``models.from_sspnet``, ``models.to_sspnet`` and ``convert`` are compared with. It keeps what a drop-in can see of
github matbambbang/sspnet, commit 6c3ce52: the names and their order, the aliases of the branch's tensors, the order and
the number of evaluations, ``coef``, one in-place ReLU a block, and the letters of the norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def norm(planes: int, norm_type: str) -> nn.Module:
    if norm_type == "b":
        return nn.BatchNorm2d(planes)
    return nn.GroupNorm({"g": min(32, planes), "l": 1, "i": planes}[norm_type], planes)


def conv3x3(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1)


def shortcut(inplanes: int, planes: int, norm_type: str, stride: int = 2) -> nn.Sequential:
    """What a subsampling ``ResBlock`` has as ``downsample``."""
    conv = nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)
    return nn.Sequential(conv, norm(planes, norm_type))


class _Branch(nn.Module):
    """n1, relu, conv1, n2, conv2, and the same modules again as a Sequential."""

    alias = "residual"

    def __init__(self, inplanes, planes, coef=1, stride=1, downsample=None, norm_type="b"):
        super().__init__()
        self.n1 = norm(inplanes, norm_type)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.n2 = norm(planes, norm_type)
        self.conv2 = conv3x3(planes, planes)
        self.coef = coef
        modules = (self.n1, self.relu, self.conv1, self.n2, self.relu, self.conv2)
        self.add_module(self.alias, nn.Sequential(*modules))


class ResBlock(_Branch):
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(self.relu(self.n1(x)))
        return self.coef * self.residual(x) + identity


class RKBlock2(_Branch):
    """mid-RK2 as published: the second stage starts from the first one's result."""

    def forward(self, x: Tensor) -> Tensor:
        middle = x + 0.5 * self.residual(x)
        return middle + self.residual(middle)


class _Holder(nn.Module):
    def __init__(self, inplanes, planes, coef=1, norm_type="b"):
        super().__init__()
        self.block = ResBlock(inplanes, planes, coef=coef, norm_type=norm_type)


class SSPBlock2(_Holder):
    def forward(self, x: Tensor) -> Tensor:
        stage = self.block(x)
        return 0.5 * x + 0.5 * self.block(stage)


class SSPBlock3(_Holder):
    def forward(self, x: Tensor) -> Tensor:
        stage = self.block(x)
        stage = 0.75 * x + 0.25 * self.block(stage)
        return 1 / 3 * x + 2 / 3 * self.block(stage)


class ArkBlock(_Branch):
    """SSP-adap, F(x) evaluated twice; ``coef`` is there but unused, as published."""

    alias = "f"

    def __init__(self, inplanes, planes, coef=1, norm_type="b", a21=-1.0, b10=0.5):
        super().__init__(inplanes, planes, coef=coef, norm_type=norm_type)
        del self.downsample  # the published block has no such attribute
        self.a21 = nn.Parameter(torch.tensor(a21))
        self.b10 = nn.Parameter(torch.tensor(b10))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a21.sigmoid(), self.b10.sigmoid()
        self.b20 = 1 - 1 / (2 * b) - a * b  # kept, as published: a tensor with a history
        stage = x + b * self.f(x)
        out = (1 - a) * x + self.b20 * self.f(x)
        return out + a * stage + 1 / (2 * b) * self.f(stage)


class _Pyramid(nn.Module):
    """conv, block1, sub1, block2, ..., avg, fc."""

    def __init__(self, groups, layers, norm_type, num_classes, init_channel, in_channels):
        super().__init__()
        self.depth = len(groups)
        planes = init_channel
        self.conv = conv3x3(in_channels, planes)
        for index, block in enumerate(groups, 1):
            if index > 1:
                down = shortcut(planes, 2 * planes, norm_type)
                sub = ResBlock(planes, 2 * planes, stride=2, downsample=down, norm_type=norm_type)
                self.add_module(f"sub{index - 1}", sub)
                planes *= 2
            blocks = (block(planes, planes, norm_type=norm_type) for _ in range(layers))
            self.add_module(f"block{index}", nn.Sequential(*blocks))
        self.avg = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.conv(x))
        for index in range(1, self.depth):
            x = getattr(self, f"sub{index}")(x)
            x = getattr(self, f"block{index + 1}")(x)
        return self.fc(self.avg(x).flatten(1))


class CIFAR10Module(_Pyramid):
    def __init__(
        self, groups, layers=1, norm_type="b", num_classes=10, init_channel=16, in_channels=3
    ):
        super().__init__(groups, layers, norm_type, num_classes, init_channel, in_channels)


class TinyImagenetModule(_Pyramid):
    def __init__(
        self, groups, layers=1, norm_type="b", num_classes=200, init_channel=16, in_channels=3
    ):
        super().__init__(groups, layers, norm_type, num_classes, init_channel, in_channels)


class MNISTModule(nn.Module):
    """downsample, blocks, linear; one ReLU for the stem and the head."""

    def __init__(
        self, groups, layers=1, norm_type="b", num_classes=10, init_channel=64, in_channels=1
    ):
        super().__init__()
        (block,) = groups
        planes = init_channel
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, planes, 3),
            norm(planes, norm_type),
            self.relu,
            nn.Conv2d(planes, planes, 4, stride=2, padding=1),
            norm(planes, norm_type),
            self.relu,
            nn.Conv2d(planes, planes, 4, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(
            *(block(planes, planes, norm_type=norm_type) for _ in range(layers))
        )
        self.linear = nn.Sequential(
            norm(planes, norm_type),
            self.relu,
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(planes, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.downsample(x)))


BLOCKS = {
    "res": ResBlock,
    "midrk2": RKBlock2,
    "ssp2": SSPBlock2,
    "ssp3": SSPBlock3,
    "ark": ArkBlock,
}
NETWORKS = {
    "cifar10": (CIFAR10Module, 3),
    "mnist": (MNISTModule, 1),
    "fmnist": (MNISTModule, 1),
    "tinyimagenet": (TinyImagenetModule, 4),
}
ARK_GROUPS = {1: ("ark",), 3: ("ark", "res", "ssp2"), 4: ("ark", "res", "ssp2", "ssp2")}


def network(
    dataset: str, model: str | Sequence[str], norm: str = "b", blocks: int = 1, **sizes: int
) -> nn.Module:
    """The published network of a data set.

    Args:
        dataset: a key of ``NETWORKS``.
        model: a key of ``BLOCKS``, or one per group; "ark" alone is the published mixture.
        norm: "b" (batch), "g" (group, min(32, C)), "l" (one group) or "i" (instance).
        blocks: per group.
        **sizes: ``num_classes``, ``init_channel``, ``in_channels`` where not as published.
    """
    build, groups = NETWORKS[dataset]
    if model == "ark":
        model = ARK_GROUPS[groups]
    names = (model,) * groups if isinstance(model, str) else model
    return build([BLOCKS[name] for name in names], blocks, norm, **sizes)


@torch.no_grad()
def randomized(module: nn.Module, seed: int) -> nn.Module:
    """The same module with every parameter and statistic set to something generic; outputs stay of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, mean: float, deviation: float) -> Tensor:
        draw = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return mean + deviation * draw

    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            value = normal(parameter, 0.0, 0.7 / parameter[0].numel() ** 0.5)
        elif name.endswith("weight"):
            value = normal(parameter, 1.0, 0.3)
        else:
            value = normal(parameter, 0.0, 0.3)
        parameter.copy_(value)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(normal(buffer, 0.0, 0.3))
        elif name.endswith("running_var"):
            buffer.copy_(normal(buffer, 0.0, 0.5).exp())
        else:
            buffer.fill_(int(torch.randint(1, 100, (), generator=generator)))
    return module
