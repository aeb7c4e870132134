"""The ops that sum, and the sum of shares: checks, allocation and launches. What each computes: ``reference``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import common_rows, dense, is_rows
from .._ops import MAX_TERMS
from . import launch as table
from . import operands
from .backward_reduce import channel_sum_kernel, dots_kernel, sum_shares_kernel
from .operands import Checks, device_of, narrowest

_DOT_LENGTH = 4096


def sum_shares(partial: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The sums of ``partial [kinds, ..., slots, C]`` over the slots, in fixed order; each kind's in a tensor."""
    kinds, *tables, slots, channels = partial.shape
    totals = tuple(partial.new_empty(shape) for _ in range(kinds))
    merge = table.merge(math.prod(tables), slots, channels, device_of(partial))
    operands.launch(
        sum_shares_kernel,
        partial,
        merge.programs,
        {
            "partial": partial,
            "totals": totals,
            "slots": slots,
            "channels": channels,
            "size": partial[0].numel(),
            "PARTS": merge.parts,
            "CHANNELS": merge.width,
        },
        merge.warps,
    )
    return totals


def channel_sum(g: Tensor) -> Tensor:
    """reference.channel_sum."""
    Checks("channel_sum", g.device).activation("g", g)
    rows, c = is_rows(g), g.shape[1]
    if g.numel() == 0:
        return g.new_zeros(c, dtype=torch.float32)
    matrix = table.sweep_matrix(g.shape, rows)
    chosen = table.sweep(matrix, 1, g.itemsize, g.itemsize, device_of(g))
    partial = g.new_empty(1, chosen.slots, c, dtype=torch.float32)
    operands.launch(
        channel_sum_kernel,
        g,
        chosen.programs,
        {"g": dense(g, rows), "partial": partial, **operands.sweep_arguments(matrix, chosen)},
        chosen.tile.warps,
    )
    return sum_shares(partial, (c,))[0]


def stage_dots(g: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """reference.stage_dots."""
    checks = Checks("stage_dots", g.device)
    checks.activation("g", g)
    checks.require(
        1 <= len(terms) <= MAX_TERMS,
        lambda: f"terms must hold 1 to {MAX_TERMS} tensors, but holds {len(terms)}",
    )
    for term in terms:
        checks.like("terms", term, g, "g")
    if g.numel() == 0:
        return g.new_zeros(len(terms), dtype=torch.float32)
    rows = common_rows([g, *terms])
    g, *terms = (dense(tensor, rows) for tensor in (g, *terms))
    slots = table.cdiv(g.numel(), _DOT_LENGTH)
    partial = g.new_empty(1, slots, len(terms), dtype=torch.float32)
    unit = table.unit(g.numel(), narrowest(g, *terms))
    operands.launch(
        dots_kernel,
        g,
        slots,
        {
            "g": g,
            "terms": tuple(terms),
            "partial": partial,
            "units": g.numel() // unit,
            "UNIT": unit,
            "LENGTH": _DOT_LENGTH,
        },
        8,
    )
    return sum_shares(partial, (len(terms),))[0]
