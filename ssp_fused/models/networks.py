"""Networks built from SSP blocks: published CIFAR, MNIST, Tiny ImageNet layouts; wide ones.

All take images in [0, 1] and normalize inside, so that an attack's epsilon and bounds are in
pixel units. Source: Kim et al., "Robust Neural Networks Inspired by Strong Stability Preserving
Runge-Kutta Methods", ECCV 2020; the wide layout: Zagoruyko and Komodakis, "Wide Residual
Networks", BMVC 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..nn import NORMS, AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack, make_norm
from ..nn.stack import run_groups
from .images import (
    CIFAR_MEAN,
    CIFAR_STD,
    MNIST_MEAN,
    MNIST_STD,
    ImageNetwork,
    Normalize,
    normalization,
)
from .names import ADAPTIVE, Scheme, group_schemes
from .sequential import FusedSequential, norm_relu


def _check(norm: str, **counts: int) -> None:
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _group(scheme: str, blocks: int, channels: int, norm: str, num_groups: int | None) -> SSPStack:
    block = AdaptiveSSPBlock if scheme == ADAPTIVE else partial(SSPBlock, scheme=scheme)
    return SSPStack(*(block(channels, norm=norm, num_groups=num_groups) for _ in range(blocks)))


def _published_init(model: nn.Module, blocks: int) -> None:
    """The published initialization: branch weights shrink with the number of blocks per group."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5) * blocks)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.zeros_(module.bias)


class SSPNet(ImageNetwork):
    """The CIFAR / Tiny ImageNet layout: `conv, block1, sub1, block2, ..., avg, fc`.

    A 3x3 convolution, groups of SSP blocks whose width doubles from one to the next through a
    subsampling residual block, global average pooling and a linear layer; no norm at the head.

    Maps images `[N, in_channels, H, W]` in [0, 1] to logits `[N, num_classes]`. Built by
    `sspnet_cifar` and `sspnet_tiny_imagenet`, which document the arguments.
    """

    def __init__(
        self,
        scheme: Sequence[str],
        blocks: int,
        *,
        norm: str,
        num_groups: int | None,
        num_classes: int,
        width: int,
        normalize: Normalize,
    ) -> None:
        super().__init__(normalize, width)
        self.conv = nn.Conv2d(normalize.mean.numel(), width, 3, padding=1)
        self.groups = len(scheme)
        for index, name in enumerate(scheme, start=1):
            if index > 1:
                down = PreActDownsample(width, 2 * width, norm=norm, num_groups=num_groups)
                self.add_module(f"sub{index - 1}", down)
                width *= 2
            self.add_module(f"block{index}", _group(name, blocks, width, norm, num_groups))
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        _published_init(self, blocks)

    def body(self, x: Tensor) -> Tensor:
        blocks = [self.block1]
        for index in range(2, self.groups + 1):
            blocks += [getattr(self, f"sub{index - 1}"), getattr(self, f"block{index}")]
        x = run_groups(blocks, self.conv(x))
        return self.fc(self.avg(x).flatten(1))


class SSPNetMNIST(ImageNetwork):
    """The MNIST / Fashion-MNIST layout: `downsample, blocks, linear`.

    A stem of three convolutions that brings 28x28 to 6x6, one group of SSP blocks, and
    norm, ReLU, global average pooling, linear. Built by `sspnet_mnist`.
    """

    def __init__(
        self,
        scheme: str,
        blocks: int,
        *,
        norm: str,
        num_groups: int | None,
        num_classes: int,
        width: int,
        normalize: Normalize,
    ) -> None:
        super().__init__(normalize, width)
        self.downsample = FusedSequential(
            nn.Conv2d(normalize.mean.numel(), width, 3),
            make_norm(norm, width, num_groups=num_groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            make_norm(norm, width, num_groups=num_groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
        )
        self.blocks = _group(scheme, blocks, width, norm, num_groups)
        self.linear = FusedSequential(
            make_norm(norm, width, num_groups=num_groups),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )

    def body(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.downsample(x)))


class WideSSPNet(ImageNetwork):
    """The wide pre-activation layout: `conv, sub1, block1, ..., sub3, block3, norm, avg, fc`.

    Each group opens with a residual block that changes the width (strides 1, 2, 2), where a wide
    ResNet has a projection shortcut; the blocks of constant width after it are SSP blocks. A norm
    and a ReLU stand before the pooling. Built by `wide_sspnet`.
    """

    def __init__(
        self,
        scheme: Sequence[str],
        blocks: int,
        widen_factor: int,
        *,
        norm: str,
        num_groups: int | None,
        num_classes: int,
        width: int,
        normalize: Normalize,
    ) -> None:
        super().__init__(normalize, width)
        self.conv = nn.Conv2d(normalize.mean.numel(), width, 3, padding=1)
        channels = width
        for index, name in enumerate(scheme):
            wide = width * widen_factor * 2**index
            down = PreActDownsample(
                channels, wide, stride=1 if index == 0 else 2, norm=norm, num_groups=num_groups
            )
            self.add_module(f"sub{index + 1}", down)
            self.add_module(f"block{index + 1}", _group(name, blocks, wide, norm, num_groups))
            channels = wide
        self.norm = make_norm(norm, channels, num_groups=num_groups)
        self.relu = nn.ReLU()
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fc.bias)

    def body(self, x: Tensor) -> Tensor:
        groups = [self.sub1, self.block1, self.sub2, self.block2, self.sub3, self.block3]
        x = run_groups(groups, self.conv(x))
        return self.fc(self.avg(norm_relu(self.norm, self.relu, x)).flatten(1))


def _pyramid(
    names: tuple[str, ...],
    blocks: int,
    norm: str,
    num_groups: int | None,
    num_classes: int,
    width: int,
    in_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> SSPNet:
    _check(norm, blocks=blocks, num_classes=num_classes, width=width, in_channels=in_channels)
    return SSPNet(
        names,
        blocks,
        norm=norm,
        num_groups=num_groups,
        num_classes=num_classes,
        width=width,
        normalize=normalization(in_channels, mean, std, {3: (CIFAR_MEAN, CIFAR_STD)}),
    )


def sspnet_cifar(
    scheme: Scheme = "ssp22",
    blocks: int = 6,
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SSPNet:
    """The published CIFAR network: three groups of `blocks` SSP blocks, widths w, 2w, 4w.

    With scheme "euler" it is the ResNet twin: the same parameters, one evaluation of F a block.

    Args:
        scheme: a name of `schemes.names()`, "adaptive" (the learned two-stage scheme), or three
            names, one per group. The published SSP-adap network is ("adaptive", "euler", "ssp22").
        blocks: SSP blocks per group.
        norm: "batch", "group" or "instance".
        num_groups: groups of a group norm; min(32, channels) if None.
        num_classes: number of logits.
        width: channels of the first group.
        in_channels: channels of the images.
        mean: normalization constants for pixels in [0, 1]; CIFAR-10's for 3 channels, else 0.5.
        std: as `mean`.

    Returns:
        A module from images `[N, in_channels, H, W]` in [0, 1] to logits `[N, num_classes]`,
        initialized as published: Kaiming uniform with a = sqrt(5) blocks, biases uniform within
        1 / sqrt(fan_in), BatchNorm weights uniform in (0, 1) and biases zero.

    Raises:
        ValueError: an unknown scheme or norm, or a count below one.
    """
    names = group_schemes(scheme, 3)
    return _pyramid(names, blocks, norm, num_groups, num_classes, width, in_channels, mean, std)


def sspnet_tiny_imagenet(
    scheme: Scheme = "ssp22",
    blocks: int = 6,
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    num_classes: int = 200,
    width: int = 16,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SSPNet:
    """The published Tiny ImageNet network: `sspnet_cifar` with a fourth group (width 8w).

    Arguments, result and errors are those of `sspnet_cifar`, with four groups; the published
    SSP-adap network is ("adaptive", "euler", "ssp22", "ssp22"). Normalization defaults are
    CIFAR-10's for 3 channels.
    """
    names = group_schemes(scheme, 4)
    return _pyramid(names, blocks, norm, num_groups, num_classes, width, in_channels, mean, std)


def sspnet_mnist(
    scheme: Scheme = "ssp22",
    blocks: int = 3,
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SSPNetMNIST:
    """The published MNIST and Fashion-MNIST network: a convolutional stem and one group of blocks.

    Arguments and errors are those of `sspnet_cifar`, with one group. Images must be at least
    10x10. Normalization defaults are MNIST's (0.1307 and 0.3081) for one channel, else 0.5;
    Fashion-MNIST's are 0.2860 and 0.3530.
    Convolutions keep torch's default initialization, as published.
    """
    (name,) = group_schemes(scheme, 1)
    _check(norm, blocks=blocks, num_classes=num_classes, width=width, in_channels=in_channels)
    return SSPNetMNIST(
        name,
        blocks,
        norm=norm,
        num_groups=num_groups,
        num_classes=num_classes,
        width=width,
        normalize=normalization(in_channels, mean, std, {1: (MNIST_MEAN, MNIST_STD)}),
    )


def wide_sspnet(
    depth: int = 28,
    widen_factor: int = 10,
    scheme: Scheme = "ssp22",
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> WideSSPNet:
    """A wide ResNet whose constant-width residual blocks are SSP blocks.

    As in WRN-depth-k there are (depth - 4) / 6 residual blocks per group; the first of each
    changes the width and is an ordinary residual block with a projection, the others are SSP
    blocks. With scheme "euler" it is the wide ResNet twin. Convolutions are Kaiming normal by
    fan-out, norms 1 and 0, biases zero.

    Args:
        depth: 6 n + 4 with n >= 2.
        widen_factor: k; the groups have width * k, 2 width * k and 4 width * k channels.
        scheme: as in `sspnet_cifar`; three groups.
        norm: as in `sspnet_cifar`, like the other arguments.
        num_groups: groups of a group norm.
        num_classes: number of logits.
        width: channels of the stem.
        in_channels: channels of the images.
        mean: normalization constants for pixels in [0, 1].
        std: as `mean`.

    Returns:
        A module from images `[N, in_channels, H, W]` in [0, 1] to logits `[N, num_classes]`.

    Raises:
        ValueError: an unknown scheme or norm, a depth not of the form 6 n + 4, a count below one.
    """
    names = group_schemes(scheme, 3)
    _check(
        norm,
        depth=depth,
        widen_factor=widen_factor,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
    )
    if depth < 16 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 2 (16, 22, 28, ...), got {depth}")
    return WideSSPNet(
        names,
        (depth - 4) // 6 - 1,
        widen_factor,
        norm=norm,
        num_groups=num_groups,
        num_classes=num_classes,
        width=width,
        normalize=normalization(in_channels, mean, std, {3: (CIFAR_MEAN, CIFAR_STD)}),
    )
