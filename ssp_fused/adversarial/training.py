"""One epoch of training, and accuracies under attack; no files, no settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attacks import fgsm, pgd
from .losses import LossFunction

Batches = Iterable[tuple[Tensor, Tensor]]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EpochResult:
    """Means over one epoch of training.

    Attributes:
        loss: mean training loss per image.
        accuracy: share of the images, as trained on (attacked, where the loss attacks), that were
            classified correctly when their batch came.
        images: images seen.
        seconds: wall time.
    """

    loss: float
    accuracy: float
    images: int
    seconds: float


class RunningTotals:
    """Loss and hits summed on the device; reading them is the only synchronization."""

    def __init__(self) -> None:
        self.images = 0
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        hits = (logits.argmax(dim=1) == y).sum()
        sums = torch.stack((loss.detach().double() * len(y), hits.double()))
        self._sums = sums if self._sums is None else self._sums + sums
        self.images += len(y)

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy so far."""
        if self._sums is None:
            raise ValueError("no batch was seen")
        loss, hits = self._sums.tolist()
        return loss / self.images, hits / self.images


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    on_batch: Callable[[int, RunningTotals], None] | None = None,
) -> EpochResult:
    """Train on each batch once, the model in training mode.

    Args:
        model: maps images to logits `[N, num_classes]`.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        optimizer: of the model's parameters.
        loss_function: from (model, x, y) to a `TrainingLoss`; `clean_loss`, or `pgd_loss` with its
            settings bound.
        scheduler: stepped after every batch.
        on_batch: called after every batch with its size and the totals so far.

    Returns:
        Means over the epoch.

    Raises:
        ValueError: there are no batches.
    """
    model.train()
    totals = RunningTotals()
    start = time.perf_counter()
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        loss, logits = loss_function(model, x, y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        totals.add(loss, logits, y)
        if on_batch is not None:
            on_batch(len(y), totals)
    loss_mean, accuracy = totals.means()
    return EpochResult(loss_mean, accuracy, totals.images, time.perf_counter() - start)


def evaluate(
    model: nn.Module, batches: Batches, attacks: Mapping[str, Attack] | None = None
) -> dict[str, float]:
    """Accuracy on the images and under each attack, the model in eval mode.

    Args:
        model: maps images to logits `[N, num_classes]`; its modules' modes are restored.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        attacks: by name, functions from (model, x, y) to attacked images; "clean" is always there.

    Returns:
        "clean" and each attack's name to the share of images classified correctly.

    Raises:
        ValueError: there are no batches.
    """
    runs: dict[str, Attack] = {"clean": lambda _model, x, _y: x, **(attacks or {})}
    modes = [(module, module.training) for module in model.modules()]
    hits: dict[str, Tensor | int] = dict.fromkeys(runs, 0)
    images = 0
    model.eval()
    try:
        with torch.no_grad():
            for x, y in batches:
                for name, attack in runs.items():
                    logits = model(attack(model, x, y))
                    hits[name] = hits[name] + (logits.argmax(dim=1) == y).sum()
                images += len(y)
    finally:
        for module, training in modes:
            module.training = training
    if not images:
        raise ValueError("no batch was seen")
    return {name: int(count) / images for name, count in hits.items()}


def standard_attacks(
    *, eps: float, step_size: float, generator: torch.Generator | None = None
) -> dict[str, Attack]:
    """The attacks robustness is reported under: FGSM, and PGD-20 from a random start; l-infinity.

    Args:
        eps: radius, in units of the images.
        step_size: of PGD, same units.
        generator: of the random start, on the images' device.

    Returns:
        "fgsm" and "pgd20", for `evaluate`.
    """

    def run_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return fgsm(model, x, y, eps=eps)

    def run_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return pgd(model, x, y, eps=eps, step_size=step_size, steps=20, generator=generator)

    return {"fgsm": run_fgsm, "pgd20": run_pgd}
