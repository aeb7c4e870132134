"""A scheme's step around any residual branch."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _fusion, schemes
from ..schemes import ShuOsher
from .rows import stage_operands


class SSPIntegrator(nn.Module):
    """One step of a scheme around any residual branch; the stages are fused, the branch is called as it is.

    Args:
        residual: F; maps ``[N, C, *]`` to the same shape, and is called once per stage.
        scheme: As in :class:`SSPBlock`.
        step_size: h.

    Raises:
        ValueError: An unknown scheme.
    """

    def __init__(
        self, residual: nn.Module, scheme: str | ShuOsher = "ssp33", *, step_size: float = 1.0
    ) -> None:
        super().__init__()
        self.residual = residual
        self.scheme = schemes.get(scheme)
        self.step_size = step_size

    def forward(self, x: Tensor) -> Tensor:
        """One step from ``x``."""
        stages, slopes = [x], []
        for alpha, beta in zip(self.scheme.alpha, self.scheme.beta, strict=True):
            slopes.append(self.residual(stages[-1]))
            operands = stage_operands(stages, slopes, alpha, beta, self.step_size)
            stages.append(_fusion.combine(*operands))
        return stages[-1]

    def extra_repr(self) -> str:
        """Scheme and step size."""
        return f"{self.scheme.name}, step_size={self.step_size}"
