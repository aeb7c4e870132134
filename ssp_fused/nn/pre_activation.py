"""What all blocks share: the pre-activation branch, and when it is run fused, in a chain or module by module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _chain, _checks, _fusion, reference
from .._backends import select
from .._checks import activation_index
from ..functional import BLOCK_OPS, Coefficients
from .norms import make_norm


class PreActivation(nn.Module):
    """norm1, conv1, norm2, conv2 of a pre-activation residual branch."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str,
        num_groups: int | None,
        activation: str,
        bias: bool,
        eps: float,
        momentum: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        activation_index(activation)
        self.activation = activation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norms = {"num_groups": num_groups, "eps": eps, "momentum": momentum, **place}
        self.norm1 = make_norm(norm, in_channels, **norms)
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, bias=bias, **place
        )
        self.norm2 = make_norm(norm, out_channels, **norms)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias, **place)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for ``x``."""
        if _fusion.runs_plain(x) or self._bypasses():
            return self._plain(x)
        return self._fused(x)

    def _bypasses(self) -> bool:
        """Whether the fused block would leave out something that a call of its modules would do."""
        return False

    def _plain(self, x: Tensor) -> Tensor:
        """The block, module by module."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor:
        """The block, with one op between two convolutions."""
        return run_chain([self], x) if self._chainable(x) else self._piecewise(x)

    def _piecewise(self, x: Tensor) -> Tensor:
        """The block, op by op, its submodules called as they are where that is not what an op would do."""
        raise NotImplementedError

    def _chainable(self, x: Tensor) -> bool:
        """Whether the block can be part of a chain."""
        norms, convs = [self.norm1, self.norm2], [self.conv1, self.conv2]
        return x.dim() == 4 and _fusion.chainable(norms, convs)

    def _joins(self, x: Tensor) -> bool:
        """Whether a chain may run the block without calling it."""
        called_as_built = type(self).forward is PreActivation.forward
        if not called_as_built or _fusion.additions(self) is not None or self._bypasses():
            return False
        return self._chainable(x)

    def _add_to(self, chain: _chain.Builder) -> None:
        """Append the block to a chain."""
        raise NotImplementedError

    def _modules_of_chain(self) -> tuple[Any, ...]:
        return self.norm1, self.conv1, self.norm2, self.conv2, self._activation

    @property
    def _activation(self) -> str:
        return self.activation

    def _act(self, y: Tensor) -> Tensor:
        return reference.torch_activation(y, activation_index(self._activation))

    def _branch(self, u: Tensor) -> Tensor:
        """F(u), module by module."""
        z = self._act(self.norm1(u))
        return self.conv2(self._act(self.norm2(self.conv1(z))))

    def _first(
        self,
        terms: Sequence[Tensor],
        coefficients: Coefficients | None = None,
        channel_bias: Tensor | None = None,
        *,
        updates: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """A stage u and z = act(norm1(u)), as ``_fusion.norm_act``."""
        return _fusion.norm_act(
            self.norm1, self._activation, terms, coefficients, channel_bias, updates=updates
        )

    def _slope(self, z: Tensor, *, updates: int = 1) -> tuple[Tensor, Tensor | None]:
        """F(u) from z = act(norm1(u)), and the bias that it still lacks."""
        inner, inner_bias = _fusion.convolve(self.conv1, z)
        _, z = _fusion.norm_act(
            self.norm2, self._activation, [inner], channel_bias=inner_bias, updates=updates
        )
        return _fusion.convolve(self.conv2, z)


def run_chain(
    blocks: Sequence[PreActivation],
    x: Tensor,
    *,
    recompute: bool = True,
    tile: int | str | None = None,
) -> Tensor:
    """Blocks that all join (``_joins``), as one autograd node; options as those of ``SSPStack``."""
    _checks.terms([x], (1.0,))
    chain = _chain.Builder(x)
    for block in blocks:
        block._add_to(chain)
    backend = select(BLOCK_OPS, (x,))
    return _chain.run(chain, backend, x, recompute=recompute, tile=tile)
