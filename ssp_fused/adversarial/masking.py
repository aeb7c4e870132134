"""Signs that gradients lead an attack astray, so that accuracy under it says little.

Source of the signs: Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security",
ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import Objective, attack_mode, attacked_module
from .attacks import cross_entropy_per_sample, fgsm, pgd
from .distributed import Ranks
from .libraries import SMALLEST_SIDE, LibraryAttack, missing_library
from .outcomes import dealt
from .training import CLEAN, Attack, Batches, outcomes

MASKING_IMAGES = 200
PASSED, SUSPICIOUS, NOT_RUN = "passed", "suspicious", "not run"
_FEW_STEPS, _MANY_STEPS, _SWEEP_STEPS, _QUERIES = 10, 100, 50, 200
# Steps of a sweep reach this many radii in all.
_REACH = 2.5
# Chance that a check finds a difference where there is none.
_SIGNIFICANCE = 0.01
# More images than these, of which the gradient is exactly zero, are no accident.
_ZERO_SHARE = 0.01
_FGSM, _FEW, _MANY, _SQUARE = "fgsm", f"pgd-{_FEW_STEPS}", f"pgd-{_MANY_STEPS}", "square"
_RADIUS, _ZERO, _NON_FINITE = "radius ", "zero gradient", "non-finite gradient"


@dataclass(frozen=True)
class MaskingChecks:
    """Checks of a model for gradient masking.

    - "radius": the larger the ball, the fewer images withstand PGD; in one that holds every image,
      no more than chance.
    - "steps": 100 steps of PGD are not weaker than 10.
    - "single step": FGSM is not stronger than 100 steps of PGD.
    - "black box": the Square attack, which sees no gradients, is not stronger than 100 steps of PGD.
    - "gradients": those of the loss at the images are finite, and not exactly zero.

    Attacks are compared image by image: one is stronger where, of the images that fall to one of the
    two alone, so many fall to it that chance would explain it in 1 of 100 cases at most.

    Attributes:
        num_classes: of the model; chance is one in so many.
        eps: radius of the ball, in units of the images.
        step_size: of PGD with 10 and 100 steps, same units.
        norm: "linf" or "l2".
        seed: of the random starts; batch i is attacked with seed + i.
    """

    num_classes: int
    eps: float
    step_size: float
    norm: str = "linf"
    seed: int = 0

    def run(self, model: nn.Module, batches: Batches, ranks: Ranks | None = None) -> dict[str, Any]:
        """Check a model; parameters, modes and random numbers are left as they were.

        Args:
            model: maps images to logits `[N, num_classes]`.
            batches: pairs of images `[N, C, H, W]` in [0, 1] and labels `[N]` on the model's device.
            ranks: processes that deal the batches among themselves.

        Returns:
            JSON types: "images"; "suspicious", whether a check is; "checks", by name "verdict"
            ("passed", "suspicious" or "not run"), "seen", a sentence, and what it is based on.

        Raises:
            ValueError: there are no batches.
        """
        found = dealt(batches, partial(self._measure, model), ranks or Ranks())
        checks = {
            "radius": self._radius(found),
            "steps": _not_stronger(found, _FEW, _MANY),
            "single step": _not_stronger(found, _FGSM, _MANY),
            "black box": _black_box(found),
            "gradients": _gradients(found),
        }
        return {
            "images": len(found[CLEAN]),
            "suspicious": any(check["verdict"] == SUSPICIOUS for check in checks.values()),
            "checks": checks,
        }

    def _measure(self, model: nn.Module, index: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        right = outcomes(model, x, y, self._attacks(x, self.seed + index))
        return {**right, **_input_gradients(model, x, y)}

    def _attacks(self, x: Tensor, seed: int) -> dict[str, Attack]:
        def climb(eps: float, step_size: float, steps: int, **options: Any) -> Attack:
            # A generator for each: the starts of one are those of all.
            generator = torch.Generator(x.device).manual_seed(seed)
            given = {"eps": eps, "step_size": step_size, "steps": steps, "norm": self.norm}
            return partial(pgd, generator=generator, **given, **options)

        attacks: dict[str, Attack] = {
            _FGSM: partial(fgsm, eps=self.eps, norm=self.norm),
            _FEW: climb(self.eps, self.step_size, _FEW_STEPS),
            _MANY: climb(self.eps, self.step_size, _MANY_STEPS),
        }
        for radius in self._radii(x):
            step_size = _REACH * radius / _SWEEP_STEPS
            name = f"{_RADIUS}{radius:.4g}"
            attacks[name] = climb(radius, step_size, _SWEEP_STEPS, early_stop=True)
        too_small = self.norm == "l2" and min(x.shape[2:]) < SMALLEST_SIDE
        if missing_library(_SQUARE) is None and not too_small:
            attacks[_SQUARE] = LibraryAttack(
                _SQUARE, eps=self.eps, norm=self.norm, seed=seed, queries=_QUERIES
            )
        return attacks

    def _radii(self, x: Tensor) -> list[float]:
        """From half of eps, each twice the last, to a ball that holds all images."""
        largest = 1.0 if self.norm == "linf" else math.sqrt(x[0].numel())
        radii, radius = [], self.eps / 2
        while 0 < radius < 0.75 * largest:
            radii.append(radius)
            radius *= 2
        return [*radii, largest]

    def _radius(self, found: dict[str, Tensor]) -> dict[str, Any]:
        right = {
            name.removeprefix(_RADIUS): values
            for name, values in found.items()
            if name.startswith(_RADIUS)
        }
        shares = {radius: _share(values) for radius, values in right.items()}
        rises = any(
            _stronger(smaller, larger)[0] for smaller, larger in itertools.pairwise(right.values())
        )
        last, chance = [*shares.values()][-1], 1 / self.num_classes
        listed = ", ".join(f"{share:.1%} at {radius}" for radius, share in shares.items())
        return {
            "verdict": SUSPICIOUS if rises or last > chance else PASSED,
            "seen": f"accuracy {listed}; chance {chance:.1%}",
            "accuracy": shares,
        }


def _black_box(found: dict[str, Tensor]) -> dict[str, Any]:
    if _SQUARE not in found:
        size = f"{_SQUARE} in l2 needs images of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels"
        return {"verdict": NOT_RUN, "seen": missing_library(_SQUARE) or size}
    return _not_stronger(found, _SQUARE, _MANY)


def _not_stronger(found: dict[str, Tensor], weak: str, strong: str) -> dict[str, Any]:
    stronger, by_weak, by_strong = _stronger(found[weak], found[strong])
    return {
        "verdict": SUSPICIOUS if stronger else PASSED,
        "seen": f"accuracy {_share(found[weak]):.1%} under {weak}, {_share(found[strong]):.1%} "
        f"under {strong}; {by_weak} images fell to {weak} alone, {by_strong} to {strong} alone",
        "fell_to_alone": {weak: by_weak, strong: by_strong},
    }


def _stronger(one: Tensor, other: Tensor) -> tuple[bool, int, int]:
    """Whether attack `one` is stronger by a one-sided sign test; images that fell to each alone."""
    by_one, by_other = int((~one & other).sum()), int((one & ~other).sum())
    trials = by_one + by_other
    ways = sum(math.comb(trials, count) for count in range(by_one, trials + 1))
    return ways < _SIGNIFICANCE * 2**trials, by_one, by_other


def _input_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model = attacked_module(model)
    with torch.enable_grad(), attack_mode(model, "eval"):
        grad, _ = Objective(model, cross_entropy_per_sample).input_gradient(x, y)
    grad = grad.flatten(1)
    return {_ZERO: (grad == 0).all(dim=1), _NON_FINITE: ~grad.isfinite().all(dim=1)}


def _gradients(found: dict[str, Tensor]) -> dict[str, Any]:
    zero, non_finite = (int(found[name].sum()) for name in (_ZERO, _NON_FINITE))
    count = len(found[_ZERO])
    return {
        "verdict": SUSPICIOUS if non_finite or zero > _ZERO_SHARE * count else PASSED,
        "seen": f"of {count} images {zero} have a gradient of exactly zero, {non_finite} one that is "
        "not finite",
        "zero": zero,
        "non_finite": non_finite,
    }


def _share(right: Tensor) -> float:
    return right.sum().item() / len(right)
