"""How much groups of blocks amplify an attack's perturbation.

Source of the measure: B. Kim et al., "Robust Neural Networks Inspired by Strong Stability Preserving
Runge-Kutta Methods", ECCV 2020.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import model_mode
from .devices import chosen_backend
from .evaluation import EvaluatedNetwork, EvaluationSettings
from .groups import Groups, group_modules, passed_through, quantiles
from .lipschitz import jacobian_norms
from .precision import full_float32
from .training import Attack, Batches

DEFAULT_ATTACK = "pgd-20"
ORDERS = {"l1": 1, "l2": 2}


def perturbation_growth(
    model: nn.Module, batches: Batches, attack: Attack, *, groups: Groups = None
) -> dict[str, dict[str, Any]]:
    """Growth of each group: the mean over samples of |out(x') - out(x)|_p / |in(x') - in(x)|_p.

    in and out are the group's input and output, taken over all elements of a sample, x' the attacked
    image, p = 1 and 2; the model is in eval mode, its modules' modes are restored.

    The largest of these ratios is a lower bound of the group's Lipschitz constant in that norm: the
    constant is the largest ratio over all pairs of inputs.

    Args:
        model: maps images to logits `[N, num_classes]`, sample by sample.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        attack: from (model, x, y) to attacked images, as `named_attack` makes; on the whole model.
        groups: names of the modules to look at, or these by the names to report them under. If None,
            the model's `SSPStack`s, without those inside another.

    Returns:
        By group: "l1" and "l2", the growth; "quantiles", of the ratios for "l1" and "l2" the
        "median", "p90" and "max"; "samples", how many it is the mean of; "left_out", how many the
        attack left unchanged at the group's input.

    Raises:
        ValueError: no batches; no groups, or modules that the model does not have; a group that is
            not called just once in a forward pass; an attack that changes no sample.
        TypeError: a group that does not map a tensor to a tensor.
    """
    modules = group_modules(model, groups)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    images = 0
    with model_mode(model, training=False), torch.no_grad():
        for x, y in batches:
            x_adv = attack(model, x, y)
            clean, attacked = (passed_through(model, modules, each) for each in (x, x_adv))
            for name in modules:
                found[name].append(_ratios(clean[name], attacked[name]))
            images += len(x)
    if not images:
        raise ValueError("no batch was seen")
    return {name: _growth(name, torch.cat(parts, dim=1), images) for name, parts in found.items()}


def _ratios(clean: tuple[Tensor, Tensor], attacked: tuple[Tensor, Tensor]) -> Tensor:
    """Of each sample whose input was changed, the ratio for p = 1 and for 2: `[2, N]`, fp64."""
    before, after = (
        (there.double() - here.double()).flatten(1)
        for here, there in zip(clean, attacked, strict=True)
    )
    # Not "> 0": what is NaN is counted, and seen.
    changed = before.abs().amax(dim=1) != 0
    before, after = before[changed], after[changed]
    return torch.stack([after.norm(p, dim=1) / before.norm(p, dim=1) for p in ORDERS.values()])


def _growth(name: str, ratios: Tensor, images: int) -> dict[str, Any]:
    samples = ratios.shape[1]
    if not samples:
        raise ValueError(f"attack must change some sample, group {name!r} saw no change")
    rows = dict(zip(ORDERS, ratios, strict=True))
    return {
        **{order: row.mean().item() for order, row in rows.items()},
        "quantiles": {order: quantiles(row) for order, row in rows.items()},
        "samples": samples,
        "left_out": images - samples,
    }


def checkpoint_growth(
    path: str | Path,
    attack: str = DEFAULT_ATTACK,
    settings: EvaluationSettings | None = None,
    *,
    lipschitz: bool = False,
) -> dict[str, Any]:
    """Perturbation growth of a checkpoint's groups on test images.

    Args:
        path: a run folder or a checkpoint.
        attack: a name as `named_attack` takes.
        settings: all else.
        lipschitz: estimate the groups' local Lipschitz constants by their Jacobians too; this takes
            two to three times the time of PGD-20.

    Returns:
        JSON types: "growth" as `perturbation_growth` returns, with `lipschitz` "jacobian_norms" as
        `jacobian_norms` returns, the attack, and where it comes from.

    Raises:
        FileNotFoundError, ValueError: as `EvaluatedNetwork`; an unknown attack.
    """
    tested = EvaluatedNetwork(path, settings or EvaluationSettings())
    function = tested.attacks([attack])[attack]
    report = {**tested.provenance(), "attack": attack}
    with chosen_backend(tested.backend), full_float32():
        report["growth"] = perturbation_growth(tested.model, tested.batches(), function)
        if lipschitz:
            seed = tested.settings.seed
            report["jacobian_norms"] = jacobian_norms(tested.model, tested.batches(), seed=seed)
    return report
