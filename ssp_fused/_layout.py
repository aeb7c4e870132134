"""Memory layouts of activations ``[N, C, *spatial]``, and the dtypes that follow from a tensor's own.

Two layouts are dense paths of every kernel: *planes* (contiguous: one plane of ``spatial`` elements per
sample and channel) and *rows* (channels last: one row of ``C`` elements per sample and position). Any other
strides are made dense, once, before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Channels that oneDNN's convolutions on rows take at once, at least.
_VECTOR = 8


def is_rows(tensor: Tensor) -> bool:
    """Whether ``tensor`` is dense with the channels innermost, and not contiguous as well."""
    return tensor.dim() > 2 and not tensor.is_contiguous() and _has_channels_innermost(tensor)


def _has_channels_innermost(tensor: Tensor) -> bool:
    if tensor.dim() == 4:  # the same, without a view
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).is_contiguous()


def common_rows(tensors: Sequence[Tensor]) -> bool:
    """The layout an op writes: rows if any operand is in rows, else planes."""
    return any(is_rows(t) for t in tensors)


def rows_are_faster(x: Tensor, dtype: torch.dtype, channels: Iterable[int]) -> bool:
    """Whether convolutions between these numbers of channels, after ``x``, would be faster if x were brought into rows.

    So they are where oneDNN convolves on a CPU: it has kernels for rows, and copies planes into a layout of its own and
    back for every convolution. Left alone are channels that do not fill its vectors, x in rows already, and what a
    compiler lays out.

    Args:
        x: in planes or in rows.
        dtype: of the convolutions.
        channels: of their inputs and outputs.
    """
    if x.device.type != "cpu" or is_rows(x) or torch.compiler.is_compiling():
        return False
    mkldnn = torch.backends.mkldnn
    if dtype == torch.float64 or not (mkldnn.enabled and mkldnn.is_available()):
        return False
    return all(count % _VECTOR == 0 for count in channels)


def dense_strides(shape: Sequence[int], rows: bool) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` in the given layout."""
    order = list(range(len(shape)))
    if rows:
        order = [0, *order[2:], 1]
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def empty(like: Tensor, rows: bool, dtype: torch.dtype) -> Tensor:
    """An uninitialized dense tensor of ``like``'s shape and device."""
    return torch.empty_strided(
        like.shape, dense_strides(like.shape, rows), dtype=dtype, device=like.device
    )


def is_dense(tensor: Tensor, rows: bool) -> bool:
    """Whether ``tensor`` is dense in the given layout."""
    return _has_channels_innermost(tensor) if rows else tensor.is_contiguous()


def dense(tensor: Tensor, rows: bool) -> Tensor:
    """``tensor`` itself where it is dense in the given layout, else a dense copy."""
    if not rows:
        return tensor.contiguous()
    if tensor.dim() == 4:  # the same, without views
        return tensor.contiguous(memory_format=torch.channels_last)
    if _has_channels_innermost(tensor):
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` dense in the layout of ``other``, of the same shape, which is in planes or in rows.

    Where both layouts are the same one (of a 1x1 kernel, say), with the strides of ``other``.
    """
    tensor = dense(tensor, is_rows(other))
    if tensor.stride() != other.stride() and other.is_contiguous():
        return tensor.as_strided(other.shape, other.stride())
    return tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of all arithmetic on tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stage_dtype(terms: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a stage: its terms' common one."""
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return dtype


def mask_shape(shape: Sequence[int], rows: bool) -> tuple[int, ...]:
    """Shape of the 1-bit activation mask (uint8) of an activation of ``shape``.

    Planes: ``[N, C, ceil(S / 8)]``; rows: ``[N * S, ceil(C / 8)]``; ``S`` is the product of the spatial sizes.
    Bit ``j % 8`` (least significant first) of byte ``j // 8`` belongs to element ``j`` of the plane or row,
    so that no byte is shared by two planes or rows.
    """
    n, c, spatial = shape[0], shape[1], 1
    for size in shape[2:]:
        spatial *= size
    return (n * spatial, (c + 7) // 8) if rows else (n, c, (spatial + 7) // 8)
