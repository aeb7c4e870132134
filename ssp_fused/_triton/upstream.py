"""Operands of the backward pass: the upstream gradient, and what the normalization was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._layout import dense, empty
from .operands import DTYPES, Checks


@dataclass(frozen=True)
class Upstream:
    """dz and what the normalization was, dense and checked; u is there, or mask bits, or neither (identity).

    Attributes:
        mean, rstd: ``[C]`` or ``[N, num_groups]``.
    """

    checks: Checks
    dz: Tensor
    scale: float
    scale_tensor: Tensor | None
    u: Tensor | None
    channel_bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    activation: int
    rows: bool

    @property
    def per_sample(self) -> bool:
        """Whether statistics are those of a sample's group."""
        return self.rstd.dim() == 2

    @property
    def per_group(self) -> int:
        """Channels that share statistics."""
        return self.dz.shape[1] // self.rstd.shape[-1]

    def arguments(self) -> dict[str, Any]:
        """As the kernels take it."""
        stage = self.dz if self.u is None else self.u
        return {
            "dz": self.dz,
            "scale": self.scale,
            "scale_tensor": self.scale_tensor,
            "u": self.u,
            "bias": self.channel_bias,
            "mean": self.mean,
            "rstd": self.rstd,
            "gamma": self.gamma,
            "beta": self.beta,
            "STAGE": DTYPES[stage.dtype],
            "ACTIVATION": self.activation,
        }

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A result of dz's shape."""
        return empty(self.dz, self.rows, dtype)

    def z(self, wanted: bool) -> Tensor | None:
        """The place of z, where it is wanted."""
        return self.empty(self.dz.dtype) if wanted else None

    def sums(self, *shape: int) -> Tensor:
        """A table of float32."""
        return self.dz.new_empty(shape, dtype=torch.float32)


def upstream(
    op: str,
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    *,
    rows: bool,
    statistics: tuple[int, ...],
    channel_bias: Tensor | None = None,
) -> Upstream:
    """The operands common to the ops of the backward pass, checked; ``statistics``: the shape of mean and rstd."""
    checks = Checks(op, dz.device)
    checks.activation("dz", dz)
    if u is not None:
        checks.like("u", u, dz, "dz")
    checks.code(activation)
    checks.numbers("scale_tensor", [scale], scale_tensor, 1)
    c = dz.shape[1]
    return Upstream(
        checks,
        dense(dz, rows),
        scale,
        scale_tensor,
        None if u is None else dense(u, rows),
        checks.vector("channel_bias", channel_bias, c),
        checks.vector("mean", mean, *statistics),
        checks.vector("rstd", rstd, *statistics),
        checks.vector("gamma", gamma, c),
        checks.vector("beta", beta, c),
        activation,
        rows,
    )
