"""Attacks by name, as accuracies are reported under: "fgsm", "pgd-20x5", "autoattack", ..."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from .attacks import fgsm, pgd
from .libraries import LIBRARY_ATTACKS, LibraryAttack
from .training import Attack

GRAMMAR = (
    "fgsm; pgd-K: K steps from a random start; pgd-KxR: the worst of R such; "
    f"sspnet-pgd-K: K steps from the image itself; {', '.join(LIBRARY_ATTACKS)}"
)

_PGD = re.compile(r"(sspnet-)?pgd-([1-9][0-9]*)(?:x([1-9][0-9]*))?")


def named_attack(
    name: str,
    *,
    eps: float,
    step_size: float,
    norm: str = "linf",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Attack:
    """An attack by its name, the model in eval mode; ours are on cross-entropy.

    "fgsm" takes one step of length eps from the image; "pgd-20" 20 steps from a random start;
    "pgd-20x5" the worst of five of these. "sspnet-pgd-20" has no random start, as the evaluation of
    the published SSP networks (github matbambbang/sspnet; that one also rounds pixels to multiples
    of 1/255 after each step, which changes something only where eps or step size are none).

    Of other libraries, without a step size: "autoattack", AutoAttack's standard version, and
    "apgd-ce" and "square", two of its attacks alone (pyautoattack); "torchattacks-autoattack", which
    takes fewer steps, and "cw", Carlini and Wagner's l2 attack, projected onto the ball (torchattacks).

    Args:
        name: one of these, with any counts.
        eps: radius of the ball, in units of the images.
        step_size: of PGD, same units.
        norm: "linf" or "l2".
        seed: of the random numbers; attacks made anew repeat them.
        device: of the images.

    Returns:
        A function from (model, x, y) to attacked images.

    Raises:
        ValueError: a name of another form.
        ImportError: the library of the attack is not installed.
    """
    if name in LIBRARY_ATTACKS:
        return LibraryAttack(name, eps=eps, norm=norm, seed=seed)
    if name == "fgsm":
        return partial(fgsm, eps=eps, norm=norm)
    found = _PGD.fullmatch(name)
    published, steps, restarts = found.groups() if found else (None, None, None)
    if steps is None or (published and restarts):
        raise ValueError(f"unknown attack {name!r}; known: {GRAMMAR}")
    return partial(
        pgd,
        eps=eps,
        step_size=step_size,
        steps=int(steps),
        norm=norm,
        random_start=not published,
        restarts=int(restarts or 1),
        generator=torch.Generator(device).manual_seed(seed),
    )


def named_attacks(names: Iterable[str], **settings: Any) -> dict[str, Attack]:
    """`named_attack` for several names, for `evaluate`.

    Each has random numbers of its own: what an attack finds does not depend on the others.

    Args:
        names: of attacks, each once.
        settings: the other arguments of `named_attack`.

    Returns:
        The attacks by name, in order.

    Raises:
        ValueError: a name of another form, or the same one twice.
    """
    attacks: dict[str, Attack] = {}
    for name in names:
        if name in attacks:
            raise ValueError(f"attack {name!r} is named twice")
        attacks[name] = named_attack(name, **settings)
    return attacks
