"""What a chain of blocks computes, as plain data: the modules' settings, and where their tensors are in one list.

``Builder`` collects blocks; ``forward`` and ``backward`` run the plan. A row of a block is one stage,
u_i = sum_k ( alpha_ik u_k + beta_ik h F(u_k) ), without its zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _autocast, _checks
from .._autograd import fixed_statistics
from .._backends import Backend
from .._distributed import process_group
from .._layout import dense

BATCH, FIXED, GROUP = "batch", "fixed", "group"


@dataclass(frozen=True)
class Norm:
    """A normalization with its activation.

    Attributes:
        kind: BATCH normalizes with the batch's statistics, FIXED with given ones, GROUP by sample and group.
        weight, bias: where they are in the list of tensors.
        mean, rstd: the same of a FIXED norm's statistics.
        activation: index into ``_ops.ACTIVATIONS``.
        process_group: over which a BATCH norm's batch is spread.
    """

    kind: str
    weight: int | None
    bias: int | None
    mean: int | None
    rstd: int | None
    eps: float
    activation: int
    num_groups: int
    process_group: Any


@dataclass(frozen=True)
class Conv:
    """A convolution; ``weight`` and ``bias`` are places in the list of tensors."""

    weight: int
    bias: int | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Term:
    """One operand of a stage: ``number`` times u_index, or times F(u_index)."""

    of_slope: bool
    index: int
    number: float


Row = tuple[Term, ...]


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        rows: a row a stage.
        coefficients: where the tensor is that replaces the rows' numbers, one after another.
        shortcut: the convolution and the norm that act(norm1(x)) goes through, to be added to the one row.
    """

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    rows: tuple[Row, ...]
    coefficients: int | None
    shortcut: tuple[Conv, Norm] | None

    def norms(self) -> list[Norm]:
        """Its norms."""
        return [self.norm1, self.norm2, *([] if self.shortcut is None else self.shortcut[1:])]

    def convs(self) -> list[Conv]:
        """Its convolutions."""
        return [self.conv1, self.conv2, *([] if self.shortcut is None else self.shortcut[:1])]

    def tensors(self) -> list[int | None]:
        """Places of everything that may require a gradient."""
        parts = (*self.norms(), *self.convs())
        return [*(place for part in parts for place in (part.weight, part.bias)), self.coefficients]

    def offset(self, row: int) -> int:
        """How many coefficients the rows before this one have."""
        return sum(len(earlier) for earlier in self.rows[:row])


@dataclass(frozen=True)
class Update:
    """One batch that running statistics take in.

    Attributes:
        moments: which of the chain's.
        rows: of how many values a channel.
        bias: where the bias is that the mean lacks, in the list of tensors.
    """

    norm: nn.Module
    moments: int
    rows: int
    bias: int | None


@dataclass(frozen=True)
class Plan:
    """A chain.

    Attributes:
        z_dtype: of the convolutions' inputs, to which autocast brings the weights.
        recording: whether a backward pass may follow.
        recompute: whether the backward pass computes the convolutions' inputs again.
        rows: whether the blocks run in rows (channels last) inside though x, and so the result, is in planes.
        tiles: from which sample to which each part of the batch goes through on its own.
        updates: of running statistics, in the order in which torch's modules would make them.
    """

    backend: Backend
    blocks: tuple[Block, ...]
    z_dtype: torch.dtype
    recording: bool
    recompute: bool
    rows: bool
    tiles: tuple[tuple[int, int], ...]
    updates: tuple[Update, ...]

    def inside(self, x: Tensor) -> Tensor:
        """``x`` in the layout in which the blocks run."""
        return dense(x, True) if self.rows else x

    def outside(self, y: Tensor) -> Tensor:
        """``y`` in the layout of the chain's operands."""
        return dense(y, False) if self.rows else y


class Builder:
    """Collects the blocks of a chain, their tensors, and the updates of running statistics that they call for.

    Args:
        x: the chain's input ``[N, C, H, W]``.
    """

    def __init__(self, x: Tensor) -> None:
        self._like = x
        self._shape: Sequence[int] = x.shape
        self._casts = _autocast.casts(x.device, x.dtype)
        self.z_dtype = _autocast.convolution_dtype([x])
        self._moments = 0
        self.blocks: list[Block] = []
        self.tensors: list[Tensor] = []
        self.updates: list[Update] = []

    def add(
        self,
        norm1: nn.Module,
        conv1: nn.Conv2d,
        norm2: nn.Module,
        conv2: nn.Conv2d,
        activation: str,
        rows: tuple[Row, ...],
        *,
        coefficients: Tensor | None = None,
        shortcut: nn.Sequential | None = None,
        repeated: bool = False,
    ) -> None:
        """Append a block; ``repeated`` says that the published one evaluates F(x) twice.

        Raises:
            ValueError: x has other channels than the block, or too few values for batch statistics.
            TypeError: x and the block's parameters have dtypes that do not go together.
        """
        code = _checks.activation_index(activation)
        if self._shape[1] != conv1.in_channels:
            raise ValueError(
                f"x must have {conv1.in_channels} channels, as the block; got shape {tuple(self._shape)}"
            )
        block = Block(
            self._norm(norm1, code),
            self._conv(conv1),
            self._norm(norm2, code),
            self._conv(conv2),
            rows,
            self._place(coefficients),
            None if shortcut is None else (self._conv(shortcut[0]), self._norm(shortcut[1], 0)),
        )
        self.blocks.append(block)
        inner = _output_shape(self._shape, conv1)
        for stage in range(len(rows)):
            uses = [self._use(norm1, self._shape), self._use(norm2, inner, block.conv1.bias)]
            if shortcut is not None:
                shape = _output_shape(self._shape, shortcut[0])
                aside = self._use(shortcut[1], shape, block.shortcut[0].bias)
                # The published block begins with the shortcut, and evaluates norm1 once more for the branch.
                uses = [uses[0], aside, *uses]
            if repeated and stage == 0:
                uses *= 2
            self.updates += [use for use in uses if use is not None]
        self._shape = _output_shape(inner, conv2)

    def _place(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _use(self, norm: nn.Module, shape: Sequence[int], bias: int | None = None) -> Update | None:
        """The update that a use of the norm calls for."""
        if _kind(norm) != BATCH:
            return None
        if process_group(norm) is None:
            _checks.batch_statistics(shape)
        self._moments += 1
        if not (norm.training and norm.track_running_stats):
            return None
        return Update(norm, self._moments - 1, shape[0] * math.prod(shape[2:]), bias)

    def _conv(self, conv: nn.Conv2d) -> Conv:
        if conv.weight.dtype != self.z_dtype and not self._casts:
            raise TypeError(
                f"x must have the dtype of the block's weights, {conv.weight.dtype}, got {self.z_dtype}"
            )
        return Conv(
            self._place(conv.weight),
            self._place(conv.bias),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )

    def _norm(self, norm: nn.Module, activation: int) -> Norm:
        kind = _kind(norm)
        _checks.channel_dtype("norm.weight", norm.weight, self._like.dtype)
        mean = rstd = None
        if kind == FIXED:
            statistics = fixed_statistics(
                norm.running_mean, norm.running_var, norm.eps, self._like.dtype
            )
            mean, rstd = map(self._place, statistics)
        return Norm(
            kind,
            self._place(norm.weight),
            self._place(norm.bias),
            mean,
            rstd,
            norm.eps,
            activation,
            norm.num_groups if kind == GROUP else 0,
            process_group(norm) if kind == BATCH else None,
        )


def _output_shape(shape: Sequence[int], conv: nn.Conv2d) -> list[int]:
    sizes = [shape[0], conv.out_channels]
    for d, size in enumerate(shape[2:]):
        reach = conv.dilation[d] * (conv.kernel_size[d] - 1) + 1
        sizes.append((size + 2 * conv.padding[d] - reach) // conv.stride[d] + 1)
    return sizes


def _kind(norm: nn.Module) -> str:
    if isinstance(norm, nn.GroupNorm):
        return GROUP
    return BATCH if norm.training or norm.running_mean is None else FIXED
