"""``convert``: swap a model's SSP and pre-activation residual blocks for fused ones that share their parameters.

A block is recognized by its class's or its attributes' names, and believed only after a trial: a copy of it and its
fused twin must agree on random input, in training and evaluation mode, buffers and input gradients included.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _fusion, schemes
from ._backends import use_backend
from .nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack, _PreActivation
from .schemes import ShuOsher

_log = logging.getLogger("ssp_fused")

Path = tuple[str, ...]

# Attributes of a residual block, as the field names them; the first of a row that a module has is the one meant.
_NORM_NAMES = (("n1", "n2"), ("norm1", "norm2"), ("bn1", "bn2"), ("gn1", "gn2"))
_SHORTCUT_NAMES = ("downsample", "shortcut", "conv_shortcut", "convShortcut", "skip", "projection")
_ACTIVATIONS = ("relu", "leaky_relu", "silu", "identity")
# The steps of the published classes that hold a residual block as `block`.
_OUTER = {"SSPBlock2": "ssp22", "SSPBlock3": "ssp33"}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
# What a class may bring of its own: everything else of nn.Module would be lost.
_OVERRIDABLE = {
    "__init__",
    "forward",
    "extra_repr",
    "__repr__",
    "__annotate__",
    "__annotate_func__",
}
_CLOSE = 1e-9  # of fp64 results that differ in the order of summation only


@dataclass(frozen=True)
class Plan:
    """How a module is run as a fused block.

    Attributes:
        norm1, conv1, norm2, conv2: where the branch's submodules are, as names from the module downwards.
        activation: a name of the ops' activations.
        scheme: the step, None for SSP-adap and for blocks with a shortcut module.
        scale: where the module is whose ``coef`` multiplies F; None where F is taken as it is.
        shortcut: where the shortcut module is, None for the identity.
        shortcut_of_input: whether the shortcut sees x, not act(norm1(x)).
        norm1_updates: how often the module evaluates norm1 on its input, for blocks with a shortcut.
        same: where norm1 is found once more: the module that the shortcut goes through.
        uncalled: submodules that the fused block does not call, and which must therefore be without hooks.
    """

    norm1: Path
    conv1: Path
    norm2: Path
    conv2: Path
    activation: str = "relu"
    scheme: ShuOsher | None = None
    scale: Path | None = None
    shortcut: Path | None = None
    shortcut_of_input: bool = False
    norm1_updates: int = 1
    same: Path | None = None
    uncalled: tuple[Path, ...] = ()


class _Converted(_PreActivation):
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
            _fusion.report(f"a {self._kind.__name__} is run as it is, unfused: {reason}")
        return reason is not None

    def _would_bypass(self) -> str | None:
        """What the fused block would leave out, if anything."""
        for path in self._plan.uncalled:
            addition = _fusion.additions(_at(self, path))
            if addition is not None:
                return f"{'.'.join(path)}: {addition}"
        same = self._plan.same
        if same is not None and not _interchangeable(_at(self, same), self.norm1):
            return f"{'.'.join(same)} was replaced"
        return None

    def _plain(self, x: Tensor) -> Tensor:
        return self._kind.forward(self, x)

    @property
    def _activation(self) -> str:
        return self._plan.activation

    @property
    def norm1(self) -> nn.Module:
        return _at(self, self._plan.norm1)

    @property
    def conv1(self) -> nn.Module:
        return _at(self, self._plan.conv1)

    @property
    def norm2(self) -> nn.Module:
        return _at(self, self._plan.norm2)

    @property
    def conv2(self) -> nn.Module:
        return _at(self, self._plan.conv2)


class ConvertedSSPBlock(_Converted, SSPBlock):
    """A block of constant shape, u_i = sum_{k<i} ( alpha_ik u_k + beta_ik h F(u_k) ), h being its ``coef``."""

    @property
    def scheme(self) -> ShuOsher:
        return self._plan.scheme

    @property
    def step_size(self) -> float:
        return _scale(self)


class ConvertedAdaptiveSSPBlock(_Converted, AdaptiveSSPBlock):
    """The published ArkBlock."""

    step_size = 1.0


class ConvertedDownsample(_Converted, PreActDownsample):
    """A block with a shortcut module: shortcut(act(norm1(x))) + h F(x), or shortcut(x) + h F(x)."""

    @property
    def downsample(self) -> nn.Module:
        return _at(self, self._plan.shortcut)

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


def convert(model: nn.Module) -> nn.Module:
    """Swap every known residual block of a model for a fused one that shares its parameters and buffers.

    Known are the classes of the published SSP networks (ResBlock, with and without ``downsample``, RKBlock2,
    SSPBlock2, SSPBlock3, ArkBlock; B. Kim et al., ECCV 2020, github matbambbang/sspnet), and any residual block
    x + conv2(act(norm2(conv1(act(norm1(x)))))), or with a shortcut module in place of x, whose norms are called
    ``n1, n2``, ``norm1, norm2``, ``bn1, bn2`` or ``gn1, gn2`` and its convolutions ``conv1, conv2``. Norms may be
    BatchNorm2d, SyncBatchNorm or GroupNorm; activations ReLU, leaky ReLU (0.01), SiLU or none.

    Names are not believed: a block is swapped when its fused twin agrees with it on random input, in fp64. The others
    that look like a residual block are listed in the log ("ssp_fused", level WARNING), with the reason.

    Args:
        model: changed in place, except that a model that is itself a residual block is replaced by the result. An
            ``nn.Sequential`` that holds nothing but fused blocks becomes an :class:`~ssp_fused.nn.SSPStack`.

    Returns:
        The model. Parameters, buffers and hooks are the same objects, an optimizer made before goes on working, and
        ``state_dict`` keeps its keys.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}
    refused: dict[nn.Module, tuple[str, str]] = {}
    converted = _walk(model, "", swapped, refused)
    for module, (name, reason) in refused.items():
        place = f"{name} ({type(module).__name__})" if name else type(module).__name__
        _log.warning("not converted: %s: %s", place, reason)
    if not swapped and not refused:
        _log.warning("nothing to convert: no residual block in a %s", type(model).__name__)
    return converted


def _walk(
    module: nn.Module,
    name: str,
    swapped: dict[nn.Module, nn.Module],
    refused: dict[nn.Module, tuple[str, str]],
) -> nn.Module:
    """The module's replacement (itself, where there is none), its children replaced in place."""
    if module in swapped:
        return swapped[module]
    if isinstance(module, _PreActivation) or module in refused:
        return module
    plans = list(_candidates(module))
    if plans:
        block = _first_that_agrees(module, plans)
        if isinstance(block, nn.Module):
            swapped[module] = block
            return block
        refused[module] = (name, block)
    for child_name, child in module._modules.items():
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            module._modules[child_name] = _walk(child, path, swapped, refused)
    return _as_stack(module, swapped)


def _as_stack(module: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    blocks = module._modules.values()
    if type(module) is not nn.Sequential or not blocks or "forward" in vars(module):
        return module
    if not all(isinstance(block, _Converted) for block in blocks):
        return module
    stack = SSPStack()
    vars(stack).update(vars(module))
    swapped[module] = stack
    return stack


def _candidates(module: nn.Module) -> Iterator[Plan]:
    """What the names of the class and of the attributes suggest, the likelier first."""
    kind = type(module).__name__
    children = module._modules
    if kind in _OUTER and type(children.get("block")).__name__ == "ResBlock":
        inner = _named_branch(children["block"], ("block",), "residual")
        if inner is not None:
            uncalled = (("block",), *inner.uncalled)
            yield replace(
                inner, scheme=schemes.get(_OUTER[kind]), scale=("block",), uncalled=uncalled
            )
        return
    if kind == "ArkBlock":
        plan = _named_branch(module, (), "f")
        if plan is not None and {"a21", "b10"} <= set(module._parameters):
            yield plan
        return
    if kind in ("ResBlock", "RKBlock2"):
        plan = _named_branch(module, (), "residual")
        if plan is not None and kind == "RKBlock2":
            yield replace(plan, scheme=schemes.get("sspnet-midrk2"))
            return
        if plan is not None and children.get("downsample") is None:
            yield replace(plan, scheme=schemes.get("euler"), scale=())
            return
        if plan is not None:
            yield replace(plan, scale=(), shortcut=("downsample",), norm1_updates=2, same=("n1",))
            return
    yield from _plain_candidates(module)


def _named_branch(module: nn.Module, prefix: Path, branch: str) -> Plan | None:
    """The published layout: n1, relu, conv1, n2, conv2, called through a Sequential (`branch`) of the same modules."""
    sequence = module._modules.get(branch)
    names = ("n1", "relu", "conv1", "n2", "relu", "conv2")
    if not isinstance(sequence, nn.Sequential) or len(sequence) != len(names):
        return None
    if any(module._modules.get(name) is None for name in names):
        return None
    inside = [(*prefix, branch, str(index)) for index in range(len(names))]
    uncalled = ((*prefix, branch), (*prefix, "relu"), inside[1], inside[4])
    return Plan(inside[0], inside[2], inside[3], inside[5], uncalled=uncalled)


def _plain_candidates(module: nn.Module) -> Iterator[Plan]:
    """Pre-activation blocks of anyone's: every activation, shortcut and count of norm1's evaluations that may be."""
    children = module._modules

    def has(*names: str) -> bool:
        return all(children.get(name) is not None for name in names)

    norms = next((pair for pair in _NORM_NAMES if has(*pair)), None)
    if norms is None or not has("conv1", "conv2"):
        return
    shortcut = next((name for name in _SHORTCUT_NAMES if _is_something(children.get(name))), None)
    called = {*norms, "conv1", "conv2", shortcut}
    plan = Plan(
        (norms[0],),
        ("conv1",),
        (norms[1],),
        ("conv2",),
        uncalled=tuple((name,) for name in children if name not in called and has(name)),
    )
    for activation in _ACTIVATIONS:
        with_act = replace(plan, activation=activation)
        if shortcut is None:
            yield replace(with_act, scheme=schemes.get("euler"))
            continue
        for of_input in (False, True):
            for updates in (1,) if of_input else (1, 2):
                yield replace(
                    with_act,
                    shortcut=(shortcut,),
                    shortcut_of_input=of_input,
                    norm1_updates=updates,
                )


def _is_something(module: nn.Module | None) -> bool:
    """Whether it is more than the identity."""
    if module is None or isinstance(module, nn.Identity):
        return False
    return not (isinstance(module, nn.Sequential) and len(module) == 0)


def _interchangeable(a: nn.Module, b: nn.Module) -> bool:
    """Whether two norms are one, or share all tensors, as torch's convert_sync_batchnorm leaves them."""
    if a is b:
        return True
    mine, theirs = ({**module._parameters, **module._buffers} for module in (a, b))
    return type(a) is type(b) and all(mine[name] is theirs.get(name) for name in mine)


def _block(module: nn.Module, plan: Plan) -> _Converted:
    if plan.shortcut is not None:
        return ConvertedDownsample(module, plan)
    return (ConvertedAdaptiveSSPBlock if plan.scheme is None else ConvertedSSPBlock)(module, plan)


def _at(module: nn.Module, path: Path) -> nn.Module:
    for name in path:
        module = module._modules[name]
    return module


def _scale(block: _Converted) -> Any:
    path = block._plan.scale
    return 1.0 if path is None else getattr(_at(block, path), "coef", 1.0)


def _first_that_agrees(module: nn.Module, plans: list[Plan]) -> nn.Module | str:
    """The fused block of the first plan that computes what the module computes, or why there is none."""
    reason = _unsuitable(module, plans[0])
    if reason is not None:
        return reason
    channels = _at(module, plans[0].conv1).in_channels
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            expected = _results(_specimen(module), type(module).forward, channels)
            for plan in plans:
                if all(
                    _agree(_results(_block(_specimen(module), plan), run, channels), expected)
                    for run in (_fused_by_reference, _Converted._plain)
                ):
                    return _block(module, plan)
    except Exception as error:  # whatever a stranger's module raises
        text = " ".join(str(error).split())
        return f"it could not be tried on random input ({type(error).__name__}: {text})"
    return (
        "on random input it computes neither x + conv2(act(norm2(conv1(act(norm1(x)))))) nor another known block, "
        f"act being one of {', '.join(_ACTIVATIONS)}"
    )


def _unsuitable(module: nn.Module, plan: Plan) -> str | None:
    """What is wrong with the module before it is tried."""
    kind = type(module)
    overridden = {
        name
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if callable(value) and name in vars(nn.Module) and name not in _OVERRIDABLE
    }
    if overridden:
        return f"its class overrides {', '.join(sorted(overridden))} of nn.Module"
    if "forward" in vars(module):
        return "its forward was replaced"
    for name in ("norm1", "norm2"):
        norm = _at(module, getattr(plan, name))
        if not isinstance(norm, _NORMS):
            return f"its {name} is a {type(norm).__name__}, none of {_names(_NORMS)}"
    for name in ("conv1", "conv2"):
        conv = _at(module, getattr(plan, name))
        if not isinstance(conv, nn.Conv2d):
            return f"its {name} is a {type(conv).__name__}, not a Conv2d"
    return None


def _names(types: Iterable[type]) -> str:
    return ", ".join(t.__name__ for t in types)


def _specimen(module: nn.Module) -> nn.Module:
    """A copy on the CPU in fp64, its parameters and statistics such that none hides an operation; without hooks.

    Synchronized norms are plain ones there: a trial is nothing that other processes take part in.
    """
    attributes = [value for part in module.modules() for value in vars(part).values()]
    # What cannot be copied: process groups, and tensors that a forward pass has left behind.
    as_they_are = {
        id(value): value
        for value in attributes
        if (isinstance(value, Tensor) and not value.is_leaf)
        or (dist.is_available() and isinstance(value, dist.ProcessGroup))
    }
    specimen = copy.deepcopy(module, as_they_are).to(device="cpu", dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=torch.float64)

    with torch.no_grad():
        for parameter in specimen.parameters():
            if parameter.dim() > 1:
                parameter.copy_(normal(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(1 + 0.5 * normal(parameter))
        for buffer in specimen.buffers():
            if buffer.is_floating_point():
                buffer.copy_(normal(buffer).abs() + 0.5)
    for part in specimen.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.__class__ = nn.BatchNorm2d
        for hooks in _fusion.HOOKS:
            getattr(part, hooks).clear()
    return specimen


def _fused_by_reference(block: _Converted, x: Tensor) -> Tensor:
    with use_backend("reference"):
        return block._fused(x)


def _results(
    block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], channels: int
) -> list[Tensor]:
    """Output and input gradient in both modes, and the buffers afterwards."""
    random = torch.Generator().manual_seed(1)
    results = []
    for training in (True, False):
        x = torch.randn((2, channels, 7, 5), generator=random, dtype=torch.float64).requires_grad_()
        y = run(block.train(training), x.clone())  # a leaf could not be activated in place
        weights = torch.randn(y.shape, generator=random, dtype=torch.float64)
        results += [y.detach(), torch.autograd.grad((weights * y).sum(), x)[0]]
    return results + [buffer.double() for buffer in block.buffers()]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)
        for a, b in zip(found, expected, strict=True)
    )
