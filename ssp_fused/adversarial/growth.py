"""How much groups of blocks amplify an attack's perturbation.

Source of the measure: B. Kim et al., "Robust Neural Networks Inspired by Strong Stability Preserving
Runge-Kutta Methods", ECCV 2020.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SSPStack
from .checkpoint import BEST, LAST
from .devices import chosen_backend
from .evaluation import EvaluatedNetwork, EvaluationSettings
from .files import replace_file
from .training import Attack, Batches, eval_mode

DEFAULT_ATTACK = "pgd-20"
_ORDERS = {"l1": 1, "l2": 2}
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's colors, told apart with any color vision.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def perturbation_growth(
    model: nn.Module,
    batches: Batches,
    attack: Attack,
    *,
    groups: Mapping[str, str] | Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Growth of each group: the mean over samples of |out(x') - out(x)|_p / |in(x') - in(x)|_p.

    in and out are the group's input and output, taken over all elements of a sample, x' the attacked
    image, p = 1 and 2; the model is in eval mode, its modules' modes are restored.

    Args:
        model: maps images to logits `[N, num_classes]`, sample by sample.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        attack: from (model, x, y) to attacked images, as `named_attack` makes; on the whole model.
        groups: names of the modules to look at, or these by the names to report them under. If None,
            the model's `SSPStack`s, without those inside another.

    Returns:
        By group: "l1" and "l2", the growth; "samples", how many it is the mean of; "left_out", how
        many the attack left unchanged at the group's input.

    Raises:
        ValueError: no batches; no groups, or modules that the model does not have; a group that is
            not called just once in a forward pass; an attack that changes no sample.
        TypeError: a group that does not map a tensor to a tensor.
    """
    modules = _group_modules(model, groups)
    totals: dict[str, Tensor] = {}
    with eval_mode(model), torch.no_grad():
        for x, y in batches:
            x_adv = attack(model, x, y)
            clean, attacked = (_pass(model, modules, images) for images in (x, x_adv))
            for name in modules:
                found = _sums(clean[name], attacked[name])
                totals[name] = totals.get(name, 0) + found
    if not totals:
        raise ValueError("no batch was seen")
    return {name: _means(name, sums.tolist()) for name, sums in totals.items()}


def _group_modules(
    model: nn.Module, groups: Mapping[str, str] | Sequence[str] | None
) -> dict[str, nn.Module]:
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


def _pass(
    model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each module in a forward pass."""
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


def _sums(clean: tuple[Tensor, Tensor], attacked: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of the ratios for p = 1 and for 2, samples counted, samples left out; fp64."""
    before, after = (
        (there.double() - here.double()).flatten(1)
        for here, there in zip(clean, attacked, strict=True)
    )
    # Not "> 0": what is NaN is counted, and seen.
    changed = before.abs().amax(dim=1) != 0
    parts = [
        torch.where(changed, after.norm(p, dim=1) / before.norm(p, dim=1), 0).sum()
        for p in _ORDERS.values()
    ]
    return torch.stack([*parts, changed.sum(), (~changed).sum()])


def _means(name: str, sums: list[float]) -> dict[str, float]:
    *ratios, samples, left_out = sums
    if not samples:
        raise ValueError(f"attack must change some sample, group {name!r} saw no change")
    means = {order: ratio / samples for order, ratio in zip(_ORDERS, ratios, strict=True)}
    return {**means, "samples": int(samples), "left_out": int(left_out)}


def checkpoint_growth(
    path: str | Path, attack: str = DEFAULT_ATTACK, settings: EvaluationSettings | None = None
) -> dict[str, Any]:
    """Perturbation growth of a checkpoint's groups on test images.

    Args:
        path: a run folder or a checkpoint.
        attack: a name as `named_attack` takes.
        settings: all else.

    Returns:
        JSON types: "growth" as `perturbation_growth` returns, the attack, and where it comes from.

    Raises:
        FileNotFoundError, ValueError: as `EvaluatedNetwork`; an unknown attack.
    """
    tested = EvaluatedNetwork(path, settings or EvaluationSettings())
    function = tested.attacks([attack])[attack]
    with chosen_backend(tested.backend):
        growth = perturbation_growth(tested.model, tested.batches(), function)
    return {**tested.provenance(), "attack": attack, "growth": growth}


def check_figure(path: Path) -> None:
    """Find out that a figure cannot be drawn before its data is computed.

    Raises:
        ValueError: a suffix that stands for no format of figures.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"figure must end in {', '.join(FIGURE_SUFFIXES)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figure needs matplotlib: pip install 'ssp_fused[plot]'") from error


def draw_growth(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Draw the growth per group, a line for each report, p = 1 and p = 2 side by side.

    Args:
        path: the figure; its suffix is its format. Replaced whole or not at all.
        reports: of `checkpoint_growth`.

    Raises:
        ValueError, ImportError: as `check_figure`.
    """
    check_figure(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    groups = list(dict.fromkeys(name for report in reports for name in report["growth"]))
    panels = figure.subplots(1, len(_ORDERS))
    for axes, (key, p) in zip(panels, _ORDERS.items(), strict=True):
        for index, (label, report) in enumerate(zip(run_labels(reports), reports, strict=True)):
            growth = report["growth"]
            axes.plot(
                [groups.index(name) for name in growth],
                [values[key] for values in growth.values()],
                label=label,
                color=_COLORS[index % len(_COLORS)],
                marker="o",
                markersize=4,
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.set(title=f"Perturbation growth, p = {p}", xlabel="group", ylabel="out / in")
        axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    suffix = path.suffix.removeprefix(".")
    replace_file(path, lambda file: figure.savefig(file, format=suffix, dpi=150))


def run_labels(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Short names of the reports' checkpoints, or the whole ones where short ones clash."""
    paths = [Path(report["checkpoint"]) for report in reports]
    short = [path.parent.name if path.name in (BEST, LAST) else path.stem for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]
