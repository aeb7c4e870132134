"""Blocks in a row, run as few autograd nodes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import _chain, _checks, _fusion
from .pre_activation import PreActivation, run_chain


class SSPStack(nn.Sequential):
    """A chain of blocks (:class:`SSPBlock`, :class:`AdaptiveSSPBlock`, :class:`PreActDownsample`), run in order.

    Blocks that stand side by side are one autograd node: the last stage of one and the first norm of the next are one
    op. Any other module, and a block with hooks, is called as it is, between two chains.

    Attributes:
        recompute: Whether backward computes the convolutions' inputs again (True, less memory) or they are kept.
        blocks_per_node: How many blocks an autograd node has at most; None for no limit. One node hands out the
            gradients of all its parameters at its end; DistributedDataParallel over gloo was as fast either way.
        tile: How many samples go through the blocks together where nothing couples samples (group norm, or batch norm
            in evaluation mode, and no parameter requires a gradient); "cache" for as many as the device's last-level
            cache holds; None for the whole batch at once, which no tile was faster than on the two CPUs tried.
    """

    recompute: bool = True
    blocks_per_node: int | None = None
    tile: int | str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """All modules, one after another.

        Raises:
            ValueError: tile or blocks_per_node below 1; what a block says of x.
        """
        if self.tile != _chain.CACHE:
            _checks.positive_or_none("tile", self.tile)
        _checks.positive_or_none("blocks_per_node", self.blocks_per_node)
        if _fusion.runs_plain(x):
            return super().forward(x)
        chain: list[PreActivation] = []
        for module in self:
            joins = isinstance(module, PreActivation) and module._joins(x)
            if chain and (not joins or len(chain) == self.blocks_per_node):
                x, chain = self._run(chain, x), []
            if joins:
                chain.append(module)
            else:
                x = module(x)
        return self._run(chain, x) if chain else x

    def _run(self, chain: Sequence[PreActivation], x: Tensor) -> Tensor:
        return run_chain(chain, x, recompute=self.recompute, tile=self.tile)
