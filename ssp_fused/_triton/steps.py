"""The attack steps: checks, allocation and launches. What each computes: ``reference``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._layout import dense, empty, is_rows
from . import launch as table
from . import operands
from .attack import l2_kernel, linf_kernel

_L2_LENGTH = 4096


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """reference.linf_step."""
    arguments = _operands("linf_step", x_adv, grad, x, step_size, eps, low, high)
    result = arguments["result"]
    numel = result.numel()
    if numel == 0:
        return result
    sizes = operands.narrowest(x_adv, grad, x), operands.widest(x_adv, grad, x)
    matrix = table.flat_matrix(x_adv.shape)
    chosen = table.pointwise(matrix, 3, *sizes, operands.device_of(x_adv))
    tile = chosen.tile
    arguments |= {"units": numel // tile.unit, "UNIT": tile.unit, "LENGTH": tile.length}
    programs = table.cdiv(numel, tile.length)
    operands.launch(linf_kernel, result, programs, arguments, tile.warps, chosen.registers)
    return result


def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """reference.l2_step."""
    arguments = _operands("l2_step", x_adv, grad, x, step_size, eps, low, high)
    result = arguments["result"]
    if result.numel() == 0:
        return result
    samples = result.shape[0]
    length = result.numel() // samples
    unit = table.unit(length, operands.narrowest(x_adv, grad, x))
    # Accesses of single elements take a pair of registers each for their addresses.
    tile = _L2_LENGTH if unit > 1 else _L2_LENGTH // 2
    sizes = {"units": length // unit, "UNIT": unit, "LENGTH": tile}
    operands.launch(l2_kernel, result, samples, {**arguments, **sizes}, 8)
    return result


def _operands(
    op: str,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    low: float,
    high: float,
) -> dict[str, Any]:
    """A step's operands, checked, dense in the layout of x_adv, and its result."""
    checks = operands.Checks(op, x_adv.device)
    checks.activation("x_adv", x_adv)
    checks.like("grad", grad, x_adv, "x_adv")
    checks.like("x", x, x_adv, "x_adv")
    rows = is_rows(x_adv)
    return {
        "x_adv": dense(x_adv, rows),
        "grad": dense(grad, rows),
        "x": dense(x, rows),
        "result": empty(x_adv, rows, x_adv.dtype),
        "step_size": step_size,
        "eps": eps,
        "low": low,
        "high": high,
    }
