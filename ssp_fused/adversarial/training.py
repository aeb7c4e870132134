"""One epoch of training, and accuracies under attack; no files, no settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .ascent import model_mode
from .distributed import Ranks
from .losses import LossFunction, TrainingLoss
from .precision import Precision

Batches = Iterable[tuple[Tensor, Tensor]]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

CLEAN, WORST = "clean", "worst"


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
    """Loss and hits of an epoch, summed on the device; reading them is the only synchronization.

    Args:
        state: a `state_dict` to go on from.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.batches: int = state["batches"] if state else 0
        self.images: int = state["images"] if state else 0
        self._seconds: float = state["seconds"] if state else 0.0
        self._since = time.perf_counter()
        self._sums: Tensor = state["sums"] if state else torch.zeros(2, dtype=torch.float64)

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Count a batch: its mean loss, logits `[N, num_classes]` and labels `[N]`."""
        hits = (logits.argmax(dim=1) == y).sum()
        sums = torch.stack((loss.detach().double() * len(y), hits.double()))
        self._sums = self._sums.to(sums.device) + sums
        self.images += len(y)
        self.batches += 1

    def result(self) -> EpochResult:
        """Means so far.

        Raises:
            ValueError: there was no batch.
        """
        if not self.images:
            raise ValueError("no batch was seen")
        loss, hits = self._sums.tolist()
        return EpochResult(loss / self.images, hits / self.images, self.images, self.seconds)

    @property
    def seconds(self) -> float:
        """Wall time since the beginning, without that between `state_dict` and going on from it."""
        return self._seconds + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain types."""
        return {
            "batches": self.batches,
            "images": self.images,
            "seconds": self.seconds,
            "sums": self._sums.cpu(),
        }

    def over(self, ranks: Ranks) -> RunningTotals:
        """The same of all processes, each of which has counted its parts of the same batches."""
        if ranks.size == 1:
            return self
        *sums, images = ranks.sum(torch.cat((self._sums.cpu(), torch.tensor([self.images]))))
        total = {"images": round(images.item()), "sums": torch.stack(sums)}
        return RunningTotals({**self.state_dict(), **total})

    def share(self, ranks: Ranks) -> RunningTotals:
        """The inverse of `over`: all of it for the first process, only the batches for others."""
        if ranks.is_first:
            return self
        nothing = {"images": 0, "sums": torch.zeros(2, dtype=torch.float64)}
        return RunningTotals({**self.state_dict(), **nothing})


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    accumulate: int = 1,
    precision: Precision | None = None,
    on_batch: Callable[[int, RunningTotals], None] | None = None,
    totals: RunningTotals | None = None,
) -> EpochResult:
    """Train on each batch once, the model in training mode.

    Args:
        model: maps images to logits `[N, num_classes]`; in DistributedDataParallel, each process
            has its part, of the same size, of each batch.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        optimizer: of the model's parameters.
        loss_function: from (model, x, y) to a `TrainingLoss`; `clean_loss`, or `pgd_loss` with its
            settings bound.
        scheduler: stepped after every batch.
        accumulate: in how many parts (of nearly the same size) a batch is taken, for one step of
            the optimizer with the mean of their gradients. Batch statistics are those of the parts.
        precision: of forward passes, the attack's too, and scaling of the loss; full if None.
        on_batch: called after every batch with its size and the totals so far.
        totals: of the part of the epoch that was trained before; a new one if None.

    Returns:
        Means over the epoch.

    Raises:
        ValueError: there are no batches.
    """
    model.train()
    totals = RunningTotals() if totals is None else totals
    precision = Precision() if precision is None else precision
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        loss, logits = _accumulated(model, x, y, loss_function, accumulate, precision)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        if scheduler is not None:
            scheduler.step()
        totals.add(loss, logits, y)
        if on_batch is not None:
            on_batch(len(y), totals)
    return totals.result()


def _accumulated(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_function: LossFunction,
    accumulate: int,
    precision: Precision,
) -> TrainingLoss:
    """Add up the gradients of a batch's mean loss; processes exchange them in the last part."""
    parts = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
    total, logits = x.new_zeros(()), []
    for index, (images, labels) in enumerate(parts, start=1):
        alone = index < len(parts) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if alone else nullcontext():
            with precision.autocast():
                found = loss_function(model, images, labels)
            loss = found.loss * (len(labels) / len(y))
            precision.scaler.scale(loss).backward()
        total = total + loss.detach()
        logits.append(found.logits)
    return TrainingLoss(total, torch.cat(logits))


def evaluate(
    model: nn.Module,
    batches: Batches,
    attacks: Mapping[str, Attack] | None = None,
    *,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Accuracy on the images and under each attack, the model in eval mode.

    Args:
        model: maps images to logits `[N, num_classes]`; its modules' modes are restored.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` on the model's device.
        attacks: by name, functions from (model, x, y) to attacked images, as `named_attacks` makes.
        ranks: processes, each with images of its own, that get the accuracy on all images.

    Returns:
        "clean" and each attack's name to the share of images classified correctly; where there are
        attacks, also "worst": the share of those that are right on the image and under every
        attack.

    Raises:
        ValueError: there are no batches, or an attack is named "clean" or "worst".
    """
    attacks = attacks or {}
    columns = [CLEAN, *attacks, WORST] if attacks else [CLEAN]
    hits: Tensor = torch.zeros(len(columns), dtype=torch.int64)
    images = 0
    for x, y in batches:
        right = outcomes(model, x, y, attacks)
        hits = hits.to(y.device) + torch.stack([*right.values()]).sum(dim=1)
        images += len(y)
    *counts, images = (
        (ranks or Ranks()).sum(torch.cat((hits.cpu(), torch.tensor([images])))).tolist()
    )
    if not images:
        raise ValueError("no batch was seen")
    return {name: count / images for name, count in zip(columns, counts, strict=True)}


def outcomes(
    model: nn.Module, x: Tensor, y: Tensor, attacks: Mapping[str, Attack]
) -> dict[str, Tensor]:
    """Which images of a batch are classified correctly, the model in eval mode.

    Args:
        model: as in `evaluate`.
        x: images `[N, C, H, W]`.
        y: labels `[N]`.
        attacks: as in `evaluate`.

    Returns:
        Under the names that `evaluate` returns, bool `[N]`.

    Raises:
        ValueError: an attack is named "clean" or "worst".
    """
    for name in (CLEAN, WORST):
        if name in attacks:
            raise ValueError(f"attacks must not be named {name!r}: {', '.join(attacks)}")
    runs: dict[str, Attack] = {CLEAN: lambda _model, x, _y: x, **attacks}
    with model_mode(model, training=False), torch.no_grad():
        right = {
            name: model(attack(model, x, y)).argmax(dim=1) == y for name, attack in runs.items()
        }
    if attacks:
        right[WORST] = torch.stack([*right.values()]).all(dim=0)
    return right
