"""Training methods by name: the loss of each, and the settings that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .fast import NOISE, RS_STEP, FreeLoss, fgsm_rs_loss, n_fgsm_loss
from .losses import LossFunction, clean_loss, pgd_loss
from .trades import mart_loss, trades_loss

if TYPE_CHECKING:
    from .config import TrainConfig

CLEAN, FREE = "none", "free"


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        title: what it is called.
        loss: its loss; of "free", the class of its loss.
        options: settings of `TrainConfig`, beside the attack's, that are arguments of the loss.
        defaults: settings that it alone or few methods have, with their defaults; alpha is the
            step of methods that take one step, in units of eps.
    """

    title: str
    loss: Callable[..., Any]
    options: tuple[str, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> frozenset[str]:
        """The settings that not every method takes, but this one does."""
        return frozenset((*self.options, *self.defaults))


_ATTACK = ("bn_mode", "graph")
_SMOOTH = ("label_smoothing",)
METHODS = {
    CLEAN: Method("clean training", clean_loss, _SMOOTH),
    "pgd": Method("PGD", pgd_loss, (*_SMOOTH, *_ATTACK, "early_stop")),
    "trades": Method("TRADES", trades_loss, (*_SMOOTH, *_ATTACK, "beta"), {"beta": 6.0}),
    "mart": Method("MART", mart_loss, (*_ATTACK, "beta"), {"beta": 5.0}),
    "fgsm-rs": Method("FGSM-RS", fgsm_rs_loss, (*_SMOOTH, *_ATTACK), {"alpha": RS_STEP}),
    "n-fgsm": Method(
        "N-FGSM", n_fgsm_loss, (*_SMOOTH, *_ATTACK, "noise"), {"alpha": 1.0, "noise": NOISE}
    ),
    FREE: Method("Free", FreeLoss, _SMOOTH, {"alpha": 1.0, "replays": 8}),
}
_SPECIAL = frozenset().union(*(method.settings for method in METHODS.values()))


def own_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that the method has and the caller left open, with their defaults.

    Raises:
        ValueError: a setting that the method does not take was changed.
    """
    method = METHODS[config.method]
    unset = type(config)()
    for name in sorted(_SPECIAL - method.settings):
        if getattr(config, name) != getattr(unset, name):
            raise ValueError(
                f"{name} must be left out with method {config.method!r}, got {getattr(config, name)}"
            )
    left_open = {k: v for k, v in method.defaults.items() if getattr(config, k) is None}
    if "alpha" in left_open:
        left_open["alpha"] *= config.eps
    return left_open


def loss_function(config: TrainConfig, generator: torch.Generator) -> LossFunction:
    """The loss of a run, `generator` the random numbers of its attack's starts."""
    method = METHODS[config.method]
    options = {name: getattr(config, name) for name in method.options}
    if config.method == CLEAN:
        return partial(method.loss, **options)
    if "alpha" not in method.defaults:
        return partial(method.loss, **config.attack(), **options, generator=generator)
    options |= {"eps": config.eps, "step_size": config.alpha}
    if config.method == FREE:
        return method.loss(**options)
    return partial(method.loss, **options, generator=generator)


def description(config: TrainConfig) -> str:
    """The method and its attack, for a line of text."""
    title = METHODS[config.method].title
    if config.method == CLEAN:
        return title
    if config.alpha is not None:
        replays = "" if config.replays is None else f", {config.replays} replays"
        return f"{title} training{replays}, eps {config.eps:.4g}, step {config.alpha:.4g}"
    beta = "" if config.beta is None else f", beta {config.beta:.4g}"
    steps = f"eps {config.eps:.4g}, step {config.step_size:.4g}"
    return f"{title}-{config.steps} training{beta}, {steps}"
