"""Attacks that other libraries implement, run so that nothing but the images comes out of them.

Sources: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020 (AutoAttack, APGD); Andriushchenko et al., "Square Attack: a
query-efficient black-box adversarial attack via random search", ECCV 2020; Carlini, Wagner,
"Towards Evaluating the Robustness of Neural Networks", 2017.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import attack_mode, attacked_module
from .attacks import Steps, check_steps, check_tensors

_log = logging.getLogger("ssp_fused")
_said: set[str] = set()
_NORMS = {"linf": "Linf", "l2": "L2"}
_BOUNDS = (0.0, 1.0)
QUERIES = 5000
# The targeted losses compare the four largest logits.
_FEWEST_CLASSES = 4
_MOST_TARGETS = 9
# Of the Square attack in l2, which cuts images into 5 x 5 tiles.
SMALLEST_SIDE = 5


class LibraryAttack:
    """An attack of another library, as `evaluate` takes it.

    The model is attacked in eval mode, its parameters, which must be fp32, frozen, autocast off.
    Afterwards, also after an exception, modes, `requires_grad`, the state of torch's random number
    generators and the tracing function of the process are what they were.

    Attributes:
        name: one of `LIBRARY_ATTACKS`.
        warnings: what the library warned of, and how often.

    Args:
        name: "autoattack", "apgd-ce" or "square", of pyautoattack; "cw" or
            "torchattacks-autoattack", of torchattacks.
        eps: radius of the ball, in units of the images.
        norm: "linf" or "l2".
        seed: of the attack's random numbers, the same for every batch.
        queries: of the Square attack; where fewer than 5000, its squares shrink faster.

    Raises:
        ImportError: the library is not installed.
        TypeError, ValueError: eps or norm, as `pgd`.
    """

    def __init__(
        self, name: str, *, eps: float, norm: str = "linf", seed: int = 0, queries: int = QUERIES
    ) -> None:
        check_steps(Steps(norm, eps, eps, 1, _BOUNDS), "eval")
        self.name = name
        self.warnings: Counter[str] = Counter()
        self._eps, self._norm, self._seed, self._queries = eps, norm, seed, queries
        self._library, self._run = LIBRARY_ATTACKS[name]
        self._module = _imported(self._library)

    def served_by(self) -> dict[str, str]:
        """The library and its version."""
        return {"library": self._library, "version": version(self._library)}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attacked images, like x, detached.

        Raises:
            TypeError, ValueError: images or labels, as `pgd`; images or parameters that are not
                fp32; too few classes; too small images.
            RuntimeError: the library returned images outside the ball or outside [0, 1].
        """
        check_tensors(model, x, y, _BOUNDS, None)
        for what, tensor in (("x", x), *(("model", p) for p in model.parameters())):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{what} must be float32 under {self.name}, got {tensor.dtype}")
        if len(x) == 0:
            return x.detach().clone()
        if self._norm == "l2" and self.name in _WITH_SQUARE and min(x.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"{self.name} in l2 needs images of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, "
                f"got shape {tuple(x.shape)}"
            )
        model = attacked_module(model)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(x.device.type, enabled=False),
            attack_mode(model, "eval"),
            _process_restored(),
            self._warnings_kept(),
        ):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            x_adv = self._run(self, model, x, y).detach()
            check_within(x_adv, x, eps=self._eps, norm=self._norm, name=self.name)
        return x_adv

    def _pyautoattack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The standard version, or one of its attacks alone with the same settings."""
        # Counts of a process, which would blame this model for what an earlier one did.
        checks = importlib.import_module("pyautoattack.checks")
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        attack = self._module.AutoAttack(
            model, eps=self._eps, norm=_NORMS[self._norm], seed=self._seed, device=x.device
        )
        if self.name == "autoattack":
            targets = min(_MOST_TARGETS, self._num_classes(model, x) - 1)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        else:
            attack.attacks_to_run = [self.name]
        attack.square.n_queries = self._queries
        attack.square.rescale_schedule = self._queries < QUERIES
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        return x_adv

    def _torchattacks_autoattack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """That library's standard version, whose APGD and FAB take 10 steps, not 100."""
        attack = self._module.AutoAttack(
            model,
            eps=self._eps,
            norm=_NORMS[self._norm],
            seed=self._seed,
            n_classes=self._num_classes(model, x),
        )
        for part in attack._autoattack.attacks:
            if isinstance(part, self._module.Square):
                part.n_queries = self._queries
        return attack(x, y)

    def _cw(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """That library's attack knows no radius: what it finds is projected onto the ball."""
        with torch.enable_grad():
            x_adv = self._module.CW(_FromZero(model))(x, y)
        delta = x_adv - x
        if self._norm == "linf":
            delta = delta.clamp(-self._eps, self._eps)
        else:
            length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
            delta = delta * (self._eps / length.clamp(min=self._eps))
        return (x + delta).clamp(*_BOUNDS)

    def _num_classes(self, model: nn.Module, x: Tensor) -> int:
        count = model(x[:1]).shape[1]
        if count < _FEWEST_CLASSES:
            raise ValueError(
                f"{self.name} needs a model of at least {_FEWEST_CLASSES} classes, got {count}"
            )
        return count

    @contextmanager
    def _warnings_kept(self) -> Iterator[None]:
        """What pyautoattack logs is counted, and said once in this package's log."""
        handler = _Recorder()
        logger = logging.getLogger("auto-attack")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            self.warnings.update(handler.messages)
            for message in handler.messages:
                if message not in _said:
                    _said.add(message)
                    _log.warning("%s: %s", self.name, message)


Run = Callable[[LibraryAttack, nn.Module, Tensor, Tensor], Tensor]

LIBRARY_ATTACKS: dict[str, tuple[str, Run]] = {
    "autoattack": ("pyautoattack", LibraryAttack._pyautoattack),
    "apgd-ce": ("pyautoattack", LibraryAttack._pyautoattack),
    "square": ("pyautoattack", LibraryAttack._pyautoattack),
    "cw": ("torchattacks", LibraryAttack._cw),
    "torchattacks-autoattack": ("torchattacks", LibraryAttack._torchattacks_autoattack),
}


_WITH_SQUARE = ("autoattack", "square", "torchattacks-autoattack")


class _FromZero(nn.Module):
    """The model with each image's smallest logit at 0: torchattacks' CW takes any below for 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits - logits.detach().amin(dim=1, keepdim=True)


class _Recorder(logging.Handler):
    """Keeps messages of warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _imported(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"attacks of {library} need it: pip install --no-deps pyautoattack torchattacks, "
            f"and pip install scipy tqdm ({error})"
        ) from error


def missing_library(name: str) -> str | None:
    """Why the library of an attack is not usable here, or None."""
    try:
        _imported(LIBRARY_ATTACKS[name][0])
    except ImportError as error:
        return str(error)
    return None


@contextmanager
def _process_restored() -> Iterator[None]:
    """torch's random number generators and the tracing function of the process."""
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
    low, high = x_adv.flatten(1).aminmax(dim=1)
    inside = (beyond <= 0) & (low >= _BOUNDS[0]) & (high <= _BOUNDS[1])
    if not inside.all():
        raise RuntimeError(
            f"{name} returned {int((~inside).sum())} of {len(x)} images outside the {norm} ball of "
            f"radius {eps} or outside {list(_BOUNDS)}"
        )
