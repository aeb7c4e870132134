"""Images attacked on one implementation of the layers, classified by another.

A robust network withstands them on either; where it does not, one implementation's gradients hide
what the other's find.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .devices import chosen_backend
from .outcomes import summary
from .training import CLEAN, WORST, Attack, outcomes

REFERENCE = "reference"


def transfer_outcomes(
    model: nn.Module, x: Tensor, y: Tensor, attacks: Callable[[], Mapping[str, Attack]], own: str
) -> dict[str, Tensor]:
    """`outcomes` of images attacked on each of two backends, on each of the two.

    Args:
        model: maps images to logits `[N, num_classes]`.
        x: images `[N, C, H, W]`.
        y: labels `[N]`.
        attacks: makes the attacks; called for each backend, so that both draw the same numbers.
        own: the backend, beside "reference".

    Returns:
        Under the names of `outcomes`, what `own` makes and classifies; under "NAME: A on B" what is
        made by A and classified by B.
    """
    backends = (own, REFERENCE)
    made: dict[str, dict[str, Tensor]] = {}
    for backend in backends:
        with chosen_backend(backend), torch.no_grad():
            made[backend] = {name: attack(model, x, y) for name, attack in attacks().items()}
    found: dict[str, Tensor] = {}
    for source, target in itertools.product(backends, repeat=2):
        with chosen_backend(target):
            right = outcomes(model, x, y, {n: _given(images) for n, images in made[source].items()})
        if source == target == own:
            found.update(right)
        found.update({_pair(n, source, target): right[n] for n in right if n not in (CLEAN, WORST)})
    return found


def transfer_report(right: Mapping[str, Tensor], names: Sequence[str], own: str) -> dict[str, Any]:
    """What transfers, of all images.

    Args:
        right: of `transfer_outcomes`, for all images.
        names: of the attacks.
        own: the backend, beside "reference".

    Returns:
        JSON types, by attack and "A on B": `summary`, and "differs", the number of images whose
        outcome is another than that of images which `own` attacks and classifies.
    """
    report: dict[str, Any] = {}
    for name in names:
        pairs = {
            f"{source} on {target}": right[_pair(name, source, target)]
            for source, target in itertools.product((own, REFERENCE), repeat=2)
        }
        differs = {pair: int((values != right[name]).sum()) for pair, values in pairs.items()}
        report[name] = {**summary(pairs), "differs": differs}
    return report


def _pair(name: str, source: str, target: str) -> str:
    return f"{name}: {source} on {target}"


def _given(images: Tensor) -> Attack:
    return lambda _model, _x, _y: images
