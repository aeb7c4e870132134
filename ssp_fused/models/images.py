"""Images at the entry of a network: normalized, and in the layout in which what follows is fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .. import _autocast, _fusion
from .._layout import rows_are_faster

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


class Normalize(nn.Module):
    """Per-channel (x - mean) / std of images `[N, C, H, W]` in [0, 1].

    The constants belong to the data, not to what was learned: the buffers follow the module's
    device and dtype but stay out of its state_dict.

    Args:
        mean: one number per channel, in pixel units of [0, 1].
        std: one positive number per channel, same units.

    Raises:
        ValueError: as many means as deviations are wanted, and positive deviations.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(
                f"mean and std must have one entry per channel, got {len(mean)} and {len(std)}"
            )
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalization(
    in_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    defaults: dict[int, tuple[Sequence[float], Sequence[float]]],
) -> Normalize:
    """Normalization of images of `in_channels`; constants left open are those of `defaults`, else 0.5.

    Raises:
        ValueError: constants for another number of channels, or a std that is not positive.
    """
    default_mean, default_std = defaults.get(in_channels, ((0.5,) * in_channels,) * 2)
    mean = default_mean if mean is None else mean
    std = default_std if std is None else std
    if len(mean) != in_channels:
        raise ValueError(f"mean must have in_channels = {in_channels} entries, got {len(mean)}")
    return Normalize(mean, std)


class ImageNetwork(nn.Module):
    """A network that takes images in [0, 1]: `normalize`, then `body`.

    Attributes:
        channels_last_inside: Whether the body runs in channels last where that is faster: on a CPU,
            where oneDNN convolves, all widths are multiples of 8, and the blocks are fused. False
            leaves the layout of the images. Logits and gradients are the same up to rounding.
    """

    channels_last_inside: bool = True

    def __init__(self, normalize: Normalize, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.body(_InRows.apply(x) if self._is_faster_in_rows(x) else x)

    def body(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        raise NotImplementedError

    def _is_faster_in_rows(self, x: Tensor) -> bool:
        """Whether the body would run faster on `x` in rows; all widths are multiples of the first."""
        if not self.channels_last_inside or x.dim() != 4:
            return False
        dtype = _autocast.convolution_dtype([x])
        return rows_are_faster(x, dtype, [self.width]) and not _fusion.runs_plain(x)


class _InRows(Function):
    """The same images in rows; their gradient is in planes again, as the images were."""

    @staticmethod
    def forward(ctx, x):
        """A copy: with one channel, dense planes are dense rows, and convolutions go by the strides."""
        return x.clone(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, gradient):
        """The same in planes."""
        return gradient.contiguous()
