"""What the walks through a chain hand to one another: stages not computed yet, and what backward needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import dense, is_rows
from .plan import Conv


class Stage(NamedTuple):
    """sum_k c_k t_k + bias, not computed yet; ``coefficients``, where given, stands for the numbers."""

    terms: list[Tensor]
    numbers: list[float]
    coefficients: Tensor | None = None
    bias: Tensor | None = None

    def at_most(self, ops: Any, limit: int) -> Stage:
        """The same, its leading terms summed up where there are more than an op takes."""
        if len(self.terms) <= limit:
            return self
        terms, numbers, coefficients, bias = self
        while len(terms) > limit:
            partial = ops.stage_combine(terms[:limit], numbers[:limit], None, None)
            terms, numbers = [partial, *terms[limit:]], [1.0, *numbers[limit:]]
        return Stage(terms, numbers, coefficients, bias)


class Use(NamedTuple):
    """What backward needs of one application of a norm: mostly places in the list of saved tensors.

    Attributes:
        shape, dtype, rows: of u (``rows``: its layout; a compiler does not tell that of a gradient).
        operand: u, or the lone term that stands for it.
        mask: the activation's bits.
        mean, rstd, count: the statistics, where they are not the norm's own fixed ones.
        bias: place in the plan's list of tensors of a bias that the operand lacks.
        z: the result, where it is not computed again.
    """

    shape: torch.Size
    dtype: torch.dtype
    rows: bool
    operand: int | None
    mask: int | None
    mean: int | None
    rstd: int | None
    count: int | None
    bias: int | None
    z: int | None


class Slope(NamedTuple):
    """What backward needs of one evaluation of F; ``value`` is F itself, kept where coefficients are learned."""

    norm1: Use
    norm2: Use
    value: int | None


class Notes(NamedTuple):
    """What a walk forward leaves to the walk back, besides tensors.

    Attributes:
        slopes, shortcuts: places of what is kept, for each evaluation of F and for each block; -1 stands for x inside
            the chain, which follows behind.
        saved: how many tensors are kept.
        whole: whether they are activations.
        masks: whether one bit an element is kept in their place.
    """

    slopes: tuple[Slope, ...]
    shortcuts: tuple[Use | None, ...]
    saved: int
    whole: bool
    masks: bool


class Weights:
    """The convolutions' weights as one walk takes them: in the dtype of the activations, and in rows where these are.

    torch would bring them there at every call.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._found: dict[int, Tensor] = {}

    def of(self, conv: Conv, activation: Tensor) -> Tensor:
        """That of ``conv``; all activations of a walk have the dtype and the layout of the first."""
        if torch.compiler.is_compiling():  # lays tensors out, and computes them once, by itself
            return cast(self._tensors[conv.weight], activation.dtype)
        weight = self._found.get(conv.weight)
        if weight is None:
            weight = cast(self._tensors[conv.weight], activation.dtype)
            if is_rows(activation):
                weight = dense(weight, True)
            self._found[conv.weight] = weight
        return weight


def get(tensors: Sequence[Tensor], place: int | None) -> Tensor | None:
    return None if place is None else tensors[place]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes its time also where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
