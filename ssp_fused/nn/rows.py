"""One row of a tableau, u_i = sum_k ( alpha_k u_k + beta_k h F(u_k) ), without its zeros."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._chain import Row, Term


def chain_row(alpha: Sequence[float], beta: Sequence[float], step_size: float) -> Row:
    """The row as a chain takes it; h is ``step_size``."""
    stages = [Term(False, k, float(a)) for k, a in enumerate(alpha) if a != 0]
    return (*stages, *(Term(True, k, float(b * step_size)) for k, b in enumerate(beta) if b != 0))


def stage_operands(
    stages: Sequence[Tensor],
    slopes: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    step_size: float,
    bias: Tensor | None = None,
) -> tuple[list[Tensor], list[float], Tensor | None]:
    """The row as arguments of ``_fusion.combine``: operands, coefficients and channel bias.

    Every slope lacks the same bias, which therefore comes in once, (sum_k beta_k h) times.
    """
    beta = [b * step_size for b in beta]
    operands = [*zip(alpha, stages, strict=True), *zip(beta, slopes, strict=True)]
    operands = [(c, t) for c, t in operands if c != 0]
    total = sum(beta)
    if bias is not None and total != 1:
        bias = bias * total
    return [t for _, t in operands], [c for c, _ in operands], bias
