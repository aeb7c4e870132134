"""Attacks that other libraries implement, run so that nothing but the images comes out of them.

Sources: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020 (AutoAttack), as pyautoattack implements it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import attack_mode, attacked_module
from .attacks import Steps, check_steps, check_tensors

_NORMS = {"linf": "Linf", "l2": "L2"}
_BOUNDS = (0.0, 1.0)
# The targeted losses compare the four largest logits.
_FEWEST_CLASSES = 4
_MOST_TARGETS = 9


@dataclass(frozen=True)
class LibraryAttack:
    """An attack of another library, as `evaluate` takes it.

    The model is attacked in eval mode and in the precision of its parameters, which must be fp32;
    parameters are frozen meanwhile. Afterwards, also after an exception, modes, `requires_grad` and
    the state of torch's random number generators are what they were.

    Attributes:
        name: as in `named_attack`.
        eps: radius of the ball, in units of the images.
        norm: "linf" or "l2".
        seed: of the attack's random numbers, the same for every batch.

    Raises:
        ImportError: the library is not installed.
        TypeError, ValueError: eps or norm, as `pgd`.
    """

    name: str
    eps: float
    norm: str
    seed: int

    def __post_init__(self) -> None:
        check_steps(Steps(self.norm, self.eps, self.eps, 1, _BOUNDS), "eval")
        _module(self.library)

    @property
    def library(self) -> str:
        """Name of the package that implements the attack."""
        return LIBRARY_ATTACKS[self.name]

    @property
    def version(self) -> str:
        """Installed version of that package."""
        return version(self.library)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attacked images, like x, detached.

        Raises:
            TypeError, ValueError: images or labels, as `pgd`; images or parameters that are not
                fp32; too few classes.
            RuntimeError: the library returned images outside the ball or outside [0, 1].
        """
        check_tensors(model, x, y, _BOUNDS, None)
        for what, tensor in (("x", x), *(("model", p) for p in model.parameters())):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{what} must be float32 under {self.name}, got {tensor.dtype}")
        if len(x) == 0:
            return x.detach().clone()
        model = attacked_module(model)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(x.device.type, enabled=False),
            attack_mode(model, "eval"),
            _untouched_process(),
        ):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            x_adv = self._pyautoattack(model, x, y).detach()
            check_within(x_adv, x, eps=self.eps, norm=self.norm, name=self.name)
        return x_adv

    def _pyautoattack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = _module("pyautoattack").AutoAttack(
            model, eps=self.eps, norm=_NORMS[self.norm], seed=self.seed, device=x.device
        )
        targets = min(_MOST_TARGETS, self._num_classes(model, x) - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        return x_adv

    def _num_classes(self, model: nn.Module, x: Tensor) -> int:
        count = model(x[:1]).shape[1]
        if count < _FEWEST_CLASSES:
            raise ValueError(
                f"{self.name} needs a model of at least {_FEWEST_CLASSES} classes, got {count}"
            )
        return count


LIBRARY_ATTACKS = {"autoattack": "pyautoattack"}


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"attacks of {name} need it: pip install --no-deps pyautoattack torchattacks, "
            f"and pip install scipy tqdm ({error})"
        ) from error


@contextmanager
def _untouched_process() -> Iterator[None]:
    """Random number generators and the tracing function of the process are restored."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    traced: Any = sys.gettrace()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            sys.settrace(traced)


def check_within(x_adv: Tensor, x: Tensor, *, eps: float, norm: str, name: str) -> None:
    """Check that attacked images are in the ball around the images, up to rounding, and in [0, 1].

    In l-infinity a pixel may be one unit in the last place beyond eps; in l2 rounding may add half a
    unit of 1 to each pixel, and a relative error of 1e-6 to the norm that an attack computes.

    Args:
        x_adv: attacked images `[N, ...]`, float32.
        x: images, of the same shape.
        eps: radius of the ball.
        norm: "linf" or "l2".
        name: of the attack.

    Raises:
        RuntimeError: some image is not, or is not finite.
    """
    delta = (x_adv.double() - x.double()).flatten(1)
    if norm == "linf":
        largest = torch.maximum(x_adv, x).clamp(min=eps).flatten(1)
        ulp = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
        beyond = (delta.abs() - eps - ulp).amax(dim=1)
    else:
        half_ulp = torch.finfo(torch.float32).eps / 2
        beyond = delta.norm(dim=1) - eps * (1 + 1e-6) - half_ulp * delta.shape[1] ** 0.5
    inside = (beyond <= 0) & (x_adv.flatten(1).amin(dim=1) >= _BOUNDS[0])
    inside &= x_adv.flatten(1).amax(dim=1) <= _BOUNDS[1]
    if not inside.all():
        raise RuntimeError(
            f"{name} returned {int((~inside).sum())} of {len(x)} images outside the {norm} ball of "
            f"radius {eps} or outside {list(_BOUNDS)}"
        )
