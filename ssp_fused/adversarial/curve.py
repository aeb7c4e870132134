"""Accuracy of a checkpoint over the radius of an attack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .devices import chosen_backend
from .evaluation import EvaluatedNetwork, EvaluationSettings
from .growth import DEFAULT_ATTACK
from .named import named_attack
from .precision import full_float32
from .training import CLEAN, evaluate

_OF_ONE_RADIUS = ("eps", "step_size", "settings")


def checkpoint_curve(
    path: str | Path,
    radii: Sequence[float],
    attack: str = DEFAULT_ATTACK,
    settings: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """Accuracy on test images under one attack at several radii, each on its own.

    A longer radius can come out more accurate than a shorter one: then the attack is too weak for
    it, or gradients are masked.

    Args:
        path: a run folder or a checkpoint.
        radii: positive, increasing, in units of pixels in [0, 1].
        attack: a name as `named_attack` takes.
        settings: all else. Their `eps` must be None; their `step_size` is that of every radius; if
            None, the run's share of the radius.

    Returns:
        JSON types: "points", each with "eps", "step_size" and "accuracy", the first of them that of
        clean images at eps 0; the attack, and where it comes from.

    Raises:
        FileNotFoundError, ValueError: as `EvaluatedNetwork`; radii of another form; an unknown
            attack.
    """
    settings = settings or EvaluationSettings()
    if settings.eps is not None:
        raise ValueError(f"eps must be None where radii are given, got {settings.eps}")
    ascending = all(a < b for a, b in itertools.pairwise((0, *radii)))
    if not radii or not ascending or not math.isfinite(radii[-1]):
        raise ValueError(f"radii must be positive and increasing, got {list(radii)}")
    tested = EvaluatedNetwork(path, replace(settings, eps=radii[-1]))
    steps = {eps: _step_size(tested, eps) for eps in radii}
    attacks = {
        str(eps): named_attack(
            attack,
            eps=eps,
            step_size=step_size,
            norm=settings.norm,
            seed=settings.seed,
            device=tested.device,
        )
        for eps, step_size in steps.items()
    }
    with chosen_backend(tested.backend), full_float32():
        accuracy = evaluate(tested.model, tested.batches(), attacks)
    points = [{"eps": 0.0, "step_size": 0.0, "accuracy": accuracy[CLEAN]}]
    points += [
        {"eps": eps, "step_size": step_size, "accuracy": accuracy[str(eps)]}
        for eps, step_size in steps.items()
    ]
    origin = {k: v for k, v in tested.provenance().items() if k not in _OF_ONE_RADIUS}
    return {**origin, "attack": attack, "points": points}


def _step_size(tested: EvaluatedNetwork, eps: float) -> float:
    if tested.settings.step_size is not None:
        return tested.settings.step_size
    if not tested.config.eps:
        raise ValueError("step_size must be given: the run has no eps")
    return eps * tested.config.step_size / tested.config.eps
