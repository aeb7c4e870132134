"""Operands of the ops: checked, dense, and described as the kernels take them; and the launch itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._layout import common_rows, dense, empty, stage_dtype
from .._ops import ACTIVATIONS, MAX_TERMS
from . import launch as table

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = table.Device(multiprocessors=1)


@functools.cache
def _cuda_device(index: int) -> table.Device:
    return table.Device(torch.cuda.get_device_properties(index).multi_processor_count)


def device_of(tensor: Tensor) -> table.Device:
    """What the launch table asks of the tensor's device."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else _INTERPRETED


def compile_options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """How every kernel is compiled; ``registers``: the most that a thread gets, if not all that it can have.

    Without contraction to fused multiply-adds: backward recomputes y by forward's expression, and its mask is forward's
    bit for bit in whatever kernel the expression stands.
    """
    return {
        "num_warps": warps,
        "maxnreg": registers or table.registers(warps),
        "enable_fp_fusion": False,
    }


def launch(
    kernel: Any,
    like: Tensor,
    programs: int,
    arguments: dict[str, Any],
    warps: int,
    registers: int | None = None,
) -> None:
    """Run a kernel on ``like``'s device, on its current stream."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](**arguments, **compile_options(warps, registers))


def tile_arguments(matrix: table.Matrix, tile: table.Tile) -> dict[str, Any]:
    """A matrix and its tile as the kernels take them."""
    return {
        "lines": matrix.lines,
        "units": matrix.length // tile.unit,
        "channels": matrix.channels,
        "UNIT": tile.unit,
        "LINES": tile.lines,
        "LENGTH": tile.length,
        "ROWS": matrix.rows,
    }


def sweep_arguments(matrix: table.Matrix, sweep: table.Sweep) -> dict[str, Any]:
    """A matrix and the sweep over it as the kernels take them."""
    return {
        **tile_arguments(matrix, sweep.tile),
        "batch": matrix.batch,
        "splits": sweep.splits,
    }


def group_arguments(matrix: table.Matrix, groups: table.Groups, per_group: int) -> dict[str, Any]:
    """A matrix and its groups as the kernels take them."""
    return {
        "lines": matrix.lines,
        "units": matrix.length // groups.unit,
        "UNIT": groups.unit,
        "GROUPS": groups.groups,
        "SLOTS": groups.slots,
        "PER_GROUP": per_group,
        "PLACES": groups.places,
        "ROWS": matrix.rows,
    }


def narrowest(*tensors: Tensor | None) -> int:
    """Bytes of an element of the narrowest tensor; those of the widest access where one begins between two such."""
    present = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.data_ptr() % table.VECTOR_BYTES for tensor in present):
        return table.VECTOR_BYTES
    return min(tensor.itemsize for tensor in present)


def widest(*tensors: Tensor | None) -> int:
    """Bytes of an element of the widest tensor."""
    return max(tensor.itemsize for tensor in tensors if tensor is not None)


def pointer(tensor: Tensor | None) -> Tensor | None:
    """A vector, dense."""
    return None if tensor is None else tensor.contiguous()


class Checks:
    """Raises errors that name the op, the argument, what it must be and what it was."""

    def __init__(self, op: str, device: torch.device) -> None:
        self.op, self.device = op, device

    def require(
        self, holds: bool, text: Callable[[], str], error: type[Exception] = ValueError
    ) -> None:
        """Raise unless ``holds``."""
        if not holds:
            raise error(f"{self.op}: {text()}")

    def floating(self, name: str, tensor: Tensor) -> None:
        """A tensor of a dtype that the kernels know, on the op's device."""
        self.require(
            tensor.device == self.device,
            lambda: f"{name} must be on {self.device} like the others, but is on {tensor.device}",
        )
        self.dtype(name, tensor.dtype)

    def dtype(self, name: str, dtype: torch.dtype) -> None:
        """A dtype that the kernels know."""
        self.require(
            dtype in DTYPES,
            lambda: f"{name} must be float32, float16 or bfloat16, but is {dtype}",
            TypeError,
        )

    def activation(self, name: str, tensor: Tensor) -> None:
        """A tensor ``[N, C, *spatial]``."""
        self.floating(name, tensor)
        self.require(
            tensor.dim() >= 2,
            lambda: f"{name} must have the shape [N, C, *spatial], but has {list(tensor.shape)}",
        )

    def shape(self, name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
        """An activation of another's shape."""
        self.activation(name, tensor)
        self.require(
            tensor.shape == other.shape,
            lambda: (
                f"{name} must have the shape {list(other.shape)} of {other_name}, "
                f"but has {list(tensor.shape)}"
            ),
        )

    def like(self, name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
        """An activation of another's shape, and of a dtype that goes with the other's."""
        self.shape(name, tensor, other, other_name)
        self.mixture(name, tensor.dtype, other_name, other.dtype)

    def mixture(self, name: str, dtype: torch.dtype, other_name: str, other: torch.dtype) -> None:
        """float16 does not meet bfloat16."""
        self.require(
            dtype == other or torch.float32 in (dtype, other),
            lambda: (
                f"{name} and {other_name} must share a dtype, or be float32 with float16 or bfloat16, "
                f"but are {dtype} and {other}"
            ),
            TypeError,
        )

    def result(self, name: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
        """The dtype of a result."""
        if dtype is not None:
            self.dtype(name, dtype)
            self.mixture(name, dtype, "the operands", default)
        return dtype or default

    def vector(self, name: str, tensor: Tensor | None, *shape: int) -> Tensor | None:
        """A tensor of this shape, or None, made dense."""
        if tensor is None:
            return None
        self.floating(name, tensor)
        self.require(
            tuple(tensor.shape) == shape,
            lambda: f"{name} must have the shape {list(shape)}, but has {list(tensor.shape)}",
        )
        return tensor.contiguous()

    def numbers(
        self, name: str, numbers: Sequence[float], tensor: Tensor | None, count: int
    ) -> None:
        """As many numbers as operands, as values or in a tensor."""
        if tensor is not None:
            self.require(
                tensor.device == self.device,
                lambda: (
                    f"{name} must be on {self.device} like the others, but is on {tensor.device}"
                ),
            )
        held = len(numbers) if tensor is None else tensor.numel()
        self.require(
            held == count,
            lambda: f"{name} must hold {count} value(s), one per operand, but holds {held}",
        )

    def code(self, activation: int) -> None:
        """An index into ACTIVATIONS."""
        last = len(ACTIVATIONS) - 1
        self.require(
            0 <= activation <= last,
            lambda: (
                f"activation must be an index into ACTIVATIONS, from 0 to {last}, but is {activation}"
            ),
        )

    def eps(self, eps: float) -> None:
        """Not negative."""
        self.require(eps >= 0, lambda: f"eps must not be negative, but is {eps}")

    def groups(self, num_groups: int, channels: int) -> None:
        """A divisor of the channels."""
        self.require(
            num_groups > 0 and channels % num_groups == 0,
            lambda: f"num_groups must divide the {channels} channels, but is {num_groups}",
        )


@dataclass(frozen=True)
class Stage:
    """Operands of sum_k c_k t_k + channel_bias: terms dense in the common layout."""

    checks: Checks
    terms: tuple[Tensor, ...]
    coefficients: tuple[float, ...]
    coefficient_tensor: Tensor | None
    channel_bias: Tensor | None
    dtype: torch.dtype
    rows: bool

    @property
    def like(self) -> Tensor:
        """A tensor of the stage's shape and device."""
        return self.terms[0]

    @property
    def is_copy(self) -> bool:
        """Whether the stage is its only term."""
        alone = len(self.terms) == 1 and self.channel_bias is None
        return alone and self.coefficient_tensor is None and self.coefficients == (1.0,)

    def stored(self, u: Tensor) -> Stage:
        """The stage, once it is written."""
        return replace(
            self, terms=(u,), coefficients=(1.0,), coefficient_tensor=None, channel_bias=None
        )

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A result of the stage's shape and layout."""
        return empty(self.like, self.rows, dtype or self.dtype)

    def unwanted(self, dtype: torch.dtype | None = None) -> Tensor:
        """What stands for a result that is not wanted."""
        return self.like.new_empty(0, dtype=dtype or self.dtype)

    def statistics(self, *shape: int) -> Tensor:
        """A table of float32."""
        return self.like.new_empty(shape, dtype=torch.float32)

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "terms": self.terms,
            "coefficients": self.coefficients,
            "coefficient_tensor": self.coefficient_tensor,
            "bias": self.channel_bias,
            "STAGE": DTYPES[self.dtype],
        }


def stage(
    op: str,
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
) -> Stage:
    """The operands of an op that begins with a stage, checked."""
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"{op}: terms must hold 1 to {MAX_TERMS} tensors, but holds {len(terms)}")
    checks = Checks(op, terms[0].device)
    for term in terms:
        checks.shape("terms", term, terms[0], "terms")
    for dtype, other in itertools.combinations(dict.fromkeys(term.dtype for term in terms), 2):
        checks.mixture("terms", dtype, "terms", other)
    checks.numbers("coefficients", coefficients, coefficient_tensor, len(terms))
    rows = common_rows(terms)
    return Stage(
        checks,
        tuple(dense(term, rows) for term in terms),
        () if coefficient_tensor is not None else tuple(coefficients),
        pointer(coefficient_tensor),
        checks.vector("channel_bias", channel_bias, terms[0].shape[1]),
        stage_dtype(terms),
        rows,
    )


@dataclass(frozen=True)
class Extras:
    """Operands of sum_j e_j extra_j, dense."""

    tensors: tuple[Tensor, ...]
    coefficients: tuple[float, ...]
    coefficient_tensor: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "extras": self.tensors,
            "extra_coefficients": self.coefficients,
            "extra_coefficient_tensor": self.coefficient_tensor,
        }


def extras(
    checks: Checks,
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    like: Tensor,
    rows: bool,
    dtype: torch.dtype,
) -> Extras:
    """The later stages' gradients, checked; added to a gradient of ``like``'s shape and of ``dtype``."""
    checks.require(
        len(tensors) <= MAX_TERMS,
        lambda: f"extras must hold at most {MAX_TERMS} tensors, but holds {len(tensors)}",
    )
    for extra in tensors:
        checks.shape("extras", extra, like, "dz")
        checks.mixture("extras", extra.dtype, "du", dtype)
    checks.numbers("extra_coefficients", coefficients, coefficient_tensor, len(tensors))
    return Extras(
        tuple(dense(extra, rows) for extra in tensors),
        () if coefficient_tensor is not None else tuple(coefficients),
        pointer(coefficient_tensor),
    )
