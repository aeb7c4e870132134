"""Blocks in a row, run as few autograd nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
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
        return _in_chains(self, x, self.blocks_per_node, recompute=self.recompute, tile=self.tile)


def run_groups(groups: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Stacks, blocks and any other modules, one after another.

    Where nothing is learned, as in an attack, the blocks of neighbouring stacks are one autograd node. Where something
    is, each stack has its own: its gradients are there, for DistributedDataParallel, before those of the one before.
    """
    if _fusion.runs_plain(x):
        for module in groups:
            x = module(x)
        return x
    return _in_chains((each for module in groups for each in _members(module)), x, None)


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a stack that need not be called itself, or the module."""
    if type(module) is not SSPStack or _fusion.additions(module) is not None:
        yield module
        return
    settings = (module.recompute, module.blocks_per_node, module.tile)
    as_built = settings == (SSPStack.recompute, SSPStack.blocks_per_node, SSPStack.tile)
    first = next(module.parameters(), None)  # stands for all: how nodes are cut changes no result
    learns = torch.is_grad_enabled() and first is not None and first.requires_grad
    if as_built and not learns:
        yield from module
    else:
        yield module


def _in_chains(
    modules: Iterable[nn.Module], x: Tensor, blocks_per_node: int | None, **options: Any
) -> Tensor:
    """All modules, one after another; blocks side by side are one chain, run with these options."""
    chain: list[PreActivation] = []
    for module in modules:
        joins = isinstance(module, PreActivation) and module._joins(x)
        if chain and (not joins or len(chain) == blocks_per_node):
            x, chain = run_chain(chain, x, **options), []
        if joins:
            chain.append(module)
        else:
            x = module(x)
    return run_chain(chain, x, **options) if chain else x
