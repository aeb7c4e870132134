"""Argument checks of the public functions: each names the argument, what it must be, and what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import ACTIVATIONS, MAX_TERMS

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def activation_index(name: str) -> int:
    """The code of an activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def tensor(name: str, value: object) -> Tensor:
    """A floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    return value


def terms(values: Sequence[Tensor], coefficients: Sequence[float] | Tensor) -> None:
    """One to six activations of one shape and device, and as many coefficients."""
    if isinstance(values, Tensor):
        raise TypeError("terms must be a sequence of tensors, got a tensor")
    if not 1 <= len(values) <= MAX_TERMS:
        raise ValueError(f"terms must hold 1 to {MAX_TERMS} tensors, got {len(values)}")
    first = tensor("terms[0]", values[0])
    if first.dim() < 2:
        raise ValueError(f"terms[0] must be [N, C, *spatial], got shape {tuple(first.shape)}")
    for k, value in enumerate(values[1:], start=1):
        tensor(f"terms[{k}]", value)
        same_device(f"terms[{k}]", value, "terms[0]", first)
        same_shape(f"terms[{k}]", value, "terms[0]", first)
    _dtypes_mix("terms", [value.dtype for value in values])
    if isinstance(coefficients, Tensor):
        tensor("coefficients", coefficients)
        same_device("coefficients", coefficients, "terms[0]", first)
        if coefficients.dim() != 1:
            raise ValueError(
                f"coefficients must be a 1-D tensor, got shape {tuple(coefficients.shape)}"
            )
    if len(coefficients) != len(values):
        raise ValueError(
            f"coefficients must hold one number a term ({len(values)}), got {len(coefficients)}"
        )


def _dtypes_mix(name: str, dtypes: Sequence[torch.dtype]) -> None:
    kinds = set(dtypes)
    if torch.float64 in kinds and len(kinds) > 1:
        raise TypeError(f"{name} must not mix float64 with a narrower dtype, got {list(dtypes)}")
    if {torch.float16, torch.bfloat16} <= kinds:
        raise TypeError(f"{name} must not mix float16 with bfloat16, got {list(dtypes)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors have one shape."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(value.shape)}"
        )


def channel_vector(name: str, value: Tensor | None, activation: Tensor) -> None:
    """None, or one number a channel of ``activation``."""
    if value is None:
        return
    tensor(name, value)
    same_device(name, value, "terms[0]", activation)
    channels = activation.shape[1]
    if value.shape != (channels,):
        raise ValueError(
            f"{name} must have shape ({channels},), one number a channel of terms[0] "
            f"{tuple(activation.shape)}; got {tuple(value.shape)}"
        )
    channel_dtype(name, value, activation.dtype)


def channel_dtype(name: str, value: Tensor | None, dtype: torch.dtype) -> None:
    """None, or numbers not wider than activations of ``dtype`` are computed with."""
    if value is not None and value.dtype == torch.float64 and dtype != torch.float64:
        raise TypeError(f"{name} must not be float64 where terms are {dtype}")


def groups(num_groups: int, activation: Tensor) -> None:
    """``num_groups`` divides the channels."""
    if num_groups < 1 or activation.shape[1] % num_groups:
        raise ValueError(
            f"num_groups must divide the {activation.shape[1]} channels of terms[0], got {num_groups}"
        )


def positive_or_none(name: str, value: int | None) -> None:
    """None, or a count of at least one."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a count of at least 1, or None, got {value!r}")


def epsilon(eps: float) -> None:
    """``eps`` is not negative."""
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def batch_statistics(shape: Sequence[int]) -> None:
    """Training statistics need more than one value a channel (torch.nn.functional.batch_norm's rule)."""
    if math.prod(shape) == shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(shape)}"
        )


def attack_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, bounds: tuple[float, float]
) -> None:
    """Three tensors alike, eps not negative, bounds in order."""
    for name, value in (("x_adv", x_adv), ("grad", grad), ("x", x)):
        tensor(name, value)
        same_device(name, value, "x_adv", x_adv)
        same_shape(name, value, "x_adv", x_adv)
        if value.dtype != x_adv.dtype:
            raise TypeError(
                f"{name} must have the dtype of x_adv, {x_adv.dtype}, got {value.dtype}"
            )
    epsilon(eps)
    low, high = bounds
    if not low <= high:
        raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
