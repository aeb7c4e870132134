"""Groups of a model's blocks: which they are, and what goes in and out of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SSPStack

Groups = Mapping[str, str] | Sequence[str] | None


def group_modules(model: nn.Module, groups: Groups) -> dict[str, nn.Module]:
    """The modules to look at, by the names to report them under.

    Args:
        model: what they are modules of.
        groups: names of modules, or these by the names to report them under. If None, the model's
            `SSPStack`s, without those inside another.

    Raises:
        ValueError: no groups, or modules that the model does not have.
    """
    if groups is None:
        modules = dict(_outermost_stacks(model))
        if not modules:
            raise ValueError("groups must be given: the model has no SSPStack")
        return modules
    paths = groups if isinstance(groups, Mapping) else {path: path for path in groups}
    if not paths:
        raise ValueError("groups must name a module, got none")
    modules = {}
    for name, path in paths.items():
        try:
            modules[name] = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"groups: the model has no module {path!r}") from error
    return modules


def _outermost_stacks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, SSPStack):
        yield path or "model", module
        return
    for name, child in module.named_children():
        yield from _outermost_stacks(child, f"{path}.{name}" if path else name)


def passed_through(
    model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each module in a forward pass of `model` on `x`.

    Raises:
        ValueError: a module that is not called just once.
        TypeError: a module that does not map a tensor to a tensor.
    """
    with _recorded(modules) as (inputs, outputs):
        model(x)
    for name in modules:
        if len(outputs[name]) != 1:
            raise ValueError(
                f"group {name!r} must be called once in a forward pass, was called "
                f"{len(outputs[name])} times"
            )
    return {name: (inputs[name][0], outputs[name][0]) for name in modules}


@contextmanager
def _recorded(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Lists of copies of what goes into and comes out of the modules.

    Copies, since the module or what follows it may write into these tensors.
    """
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    outputs: dict[str, list[Tensor]] = defaultdict(list)

    def record(into: list[Tensor], name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"group {name!r} must map a tensor to a tensor, found {type(value).__name__}"
            )
        into.append(value.clone())

    handles = []
    try:
        for name, module in modules.items():
            handles += [
                module.register_forward_pre_hook(
                    lambda _, args, name=name: record(inputs[name], name, args[0] if args else None)
                ),
                module.register_forward_hook(
                    lambda _, args, output, name=name: record(outputs[name], name, output)
                ),
            ]
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def quantiles(values: Tensor) -> dict[str, float]:
    """Median, 90% quantile and largest of what was found for each sample, `[N]`; NaN if one is."""
    marks = {"median": 0.5, "p90": 0.9, "max": 1.0}
    points = torch.tensor(list(marks.values()), dtype=values.dtype, device=values.device)
    return dict(zip(marks, torch.quantile(values, points).tolist(), strict=True))
