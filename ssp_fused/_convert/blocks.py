"""Fused blocks on the submodules of another module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .. import _fusion
from .._log import warn_once
from ..nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock
from ..nn.pre_activation import PreActivation
from ..schemes import ShuOsher
from .plan import Plan, at


class Converted(PreActivation):
    """A fused block on the submodules of another module, which keep the names and places they have there.

    It takes over the other module's attributes and registries of parameters, buffers, submodules and hooks, so that
    the keys of ``state_dict``, an optimizer's parameters and handles of hooks stay what they were, and its class's
    methods. Where the fused block would bypass something, it runs that class's ``forward``.
    """

    def __init__(self, original: nn.Module, plan: Plan) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(original))
        vars(self).update(_kind=type(original), _plan=plan)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = vars(self).get("_kind")  # not there yet while a copy is being made
            found = None if kind is None else inspect.getattr_static(kind, name, None)
            if found is None:
                raise
            return found.__get__(self, kind) if hasattr(found, "__get__") else found

    def _bypasses(self) -> bool:
        reason = self._would_bypass()
        if reason is not None:
            warn_once(f"a {self._kind.__name__} is run as it is, unfused: {reason}")
        return reason is not None

    def _would_bypass(self) -> str | None:
        """What the fused block would leave out, if anything."""
        for path in self._plan.uncalled:
            addition = _fusion.additions(at(self, path))
            if addition is not None:
                return f"{'.'.join(path)}: {addition}"
        same = self._plan.same
        if same is not None and not _interchangeable(at(self, same), self.norm1):
            return f"{'.'.join(same)} was replaced"
        return None

    def _plain(self, x: Tensor) -> Tensor:
        return self._kind.forward(self, x)

    @property
    def _activation(self) -> str:
        return self._plan.activation

    @property
    def norm1(self) -> nn.Module:
        return at(self, self._plan.norm1)

    @property
    def conv1(self) -> nn.Module:
        return at(self, self._plan.conv1)

    @property
    def norm2(self) -> nn.Module:
        return at(self, self._plan.norm2)

    @property
    def conv2(self) -> nn.Module:
        return at(self, self._plan.conv2)


class ConvertedSSPBlock(Converted, SSPBlock):
    """A block of constant shape, u_i = sum_{k<i} ( alpha_ik u_k + beta_ik h F(u_k) ), h being its ``coef``."""

    @property
    def scheme(self) -> ShuOsher:
        return self._plan.scheme

    @property
    def step_size(self) -> float:
        return _scale(self)


class ConvertedAdaptiveSSPBlock(Converted, AdaptiveSSPBlock):
    """The published ArkBlock."""

    step_size = 1.0


class ConvertedDownsample(Converted, PreActDownsample):
    """A block with a shortcut module: shortcut(act(norm1(x))) + h F(x), or shortcut(x) + h F(x)."""

    @property
    def downsample(self) -> nn.Module:
        return at(self, self._plan.shortcut)

    def _chainable(self, x: Tensor) -> bool:
        as_published = not self._plan.shortcut_of_input and self._plan.norm1_updates == 2
        return as_published and _scale(self) == 1 and super()._chainable(x)

    def _piecewise(self, x: Tensor) -> Tensor:
        _, z = self._first([x], updates=self._plan.norm1_updates)
        if self._plan.shortcut_of_input:
            shortcut = self.downsample(x)
        else:
            shortcut = _fusion.shortcut(self.downsample, z)
        branch, bias = self._slope(z)
        scale = _scale(self)
        if bias is not None and scale != 1:
            bias = scale * bias
        return _fusion.combine([shortcut, branch], [1.0, scale], bias)


def fused_block(module: nn.Module, plan: Plan) -> Converted:
    """The block that runs the module by the plan."""
    if plan.shortcut is not None:
        return ConvertedDownsample(module, plan)
    return (ConvertedAdaptiveSSPBlock if plan.scheme is None else ConvertedSSPBlock)(module, plan)


def _scale(block: Converted) -> Any:
    path = block._plan.scale
    return 1.0 if path is None else getattr(at(block, path), "coef", 1.0)


def _interchangeable(a: nn.Module, b: nn.Module) -> bool:
    """Whether two norms are one, or share all tensors, as torch's convert_sync_batchnorm leaves them."""
    if a is b:
        return True
    mine, theirs = ({**module._parameters, **module._buffers} for module in (a, b))
    return type(a) is type(b) and all(mine[name] is theirs.get(name) for name in mine)
