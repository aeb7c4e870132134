"""Stems and heads: norms that a ReLU follows, as one op."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _fusion


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """`relu(norm(x))`, as one op where that is what the modules' calls would compute."""
    is_relu = type(relu) is nn.ReLU and _fusion.additions(relu) is None
    if not is_relu or x.dim() != 4 or _fusion.runs_plain(x):
        return relu(norm(x))
    return _fusion.norm_act(norm, "relu", [x])[1]


class FusedSequential(nn.Sequential):
    """`nn.Sequential` in which a norm and the ReLU behind it are one op; its `state_dict` is the same."""

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module = modules.pop(0)
            if isinstance(module, _fusion.NORMS) and modules and isinstance(modules[0], nn.ReLU):
                x = norm_relu(module, modules.pop(0), x)
            else:
                x = module(x)
        return x
