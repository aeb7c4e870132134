"""A whole training run: settings in, a folder of results out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._backends import use_backend
from ..data import ImageSet, ImageSplits, load
from .attacks import pgd
from .checkpoint import save_checkpoint
from .config import TrainConfig, build_network, network_spec
from .losses import LossFunction, clean_loss, pgd_loss
from .training import RunningTotals, evaluate, train_epoch

CONFIG, METRICS, BEST, LAST = "config.json", "metrics.jsonl", "best.pt", "last.pt"
EVALUATION_BATCH = 500
# A validation set cut down with the training set stays large enough to choose by.
_MIN_LIMITED_VALIDATION = 100
_ORDER, _ATTACK, _VALIDATION = "order", "attack", "validation"


def fit(
    config: TrainConfig, splits: ImageSplits | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Train a network and keep the epoch that is best on validation data.

    Best means the highest accuracy under the training attack, or on clean images with method
    "none". The test set is not looked at. With one machine and thread count, the same settings
    give the same numbers. torch's global random state is set by the seed.

    Files in `config.out`: config.json, metrics.jsonl (a line per epoch), best.pt and last.pt.

    Args:
        config: settings; `resolved` is applied to them.
        splits: the data; loaded by its name if None.
        progress: print a line per epoch, and show a progress bar if stderr is a terminal.

    Returns:
        "best" and "last", the metrics of those epochs; "epochs", those of all; "out", the folder.

    Raises:
        ValueError: a bad setting, a folder that already holds a run, damaged data.
        FloatingPointError: the loss is no longer finite.
    """
    config = config.resolved()
    out = Path(config.out)
    if (out / CONFIG).exists():
        raise ValueError(f"out: {out} already holds a training run")
    with use_backend(config.backend) if config.backend else nullcontext():
        splits = load(config.data, config.data_dir) if splits is None else splits
        train, val = _training_data(config, splits, progress)
        spec = network_spec(config, splits)
        torch.manual_seed(config.seed)
        model = build_network(spec).to(config.device)
        steps_per_epoch = train.batch_count(config.batch_size, drop_last=True)
        optimizer, scheduler = _optimizer(model, config, config.epochs * steps_per_epoch)
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        history: list[dict[str, Any]] = []
        best: dict[str, Any] | None = None
        criterion = "val_clean" if config.method == "none" else "val_robust"
        images = steps_per_epoch * min(config.batch_size, len(train))
        with ExitStack() as stack:
            metrics_file = stack.enter_context((out / METRICS).open("w"))
            report = stack.enter_context(_Report(config.epochs, images, progress))
            for epoch in range(1, config.epochs + 1):
                learning_rate = optimizer.param_groups[0]["lr"]
                order = _seed(config.seed, _ORDER, epoch)
                result = train_epoch(
                    model,
                    train.batches(config.batch_size, shuffle_seed=order, drop_last=True),
                    optimizer,
                    _loss_function(config, _generator(config, _ATTACK, epoch)),
                    scheduler=scheduler,
                    on_batch=report.on_batch,
                )
                if not math.isfinite(result.loss):
                    raise FloatingPointError(
                        f"training diverged: the loss of epoch {epoch} is {result.loss}; "
                        "a smaller lr may help"
                    )
                metrics = {
                    "epoch": epoch,
                    "lr": learning_rate,
                    "train_loss": result.loss,
                    "train_accuracy": result.accuracy,
                    **_validate(model, val, config),
                    "images_per_second": result.images / result.seconds,
                    "seconds": result.seconds,
                }
                history.append(metrics)
                metrics_file.write(json.dumps(metrics) + "\n")
                metrics_file.flush()
                state = {
                    "model": model.state_dict(),
                    "network": spec,
                    "config": config.to_dict(),
                    "epoch": epoch,
                    "metrics": metrics,
                }
                save_checkpoint(out / LAST, state)
                if best is None or metrics[criterion] > best[criterion]:
                    best = metrics
                    save_checkpoint(out / BEST, state)
                report.on_epoch(metrics, is_best=best is metrics)
    return {"best": best, "last": history[-1], "epochs": history, "out": str(out)}


def _training_data(
    config: TrainConfig, splits: ImageSplits, progress: bool
) -> tuple[ImageSet, ImageSet]:
    train, val = splits.train, splits.val
    if config.limit is not None:
        train = train.take(config.limit)
        val = val.take(max(config.limit // 5, _MIN_LIMITED_VALIDATION))
        if progress:
            print(f"limited to {len(train)} training and {len(val)} validation images", flush=True)
    return train.to(config.device), val.to(config.device)


def _optimizer(
    model: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    if config.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    # Momentum stays where it was asked to be: only the learning rate cycles.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=total_steps, cycle_momentum=False
    )


def _loss_function(config: TrainConfig, generator: torch.Generator) -> LossFunction:
    if config.method == "none":
        return clean_loss
    return partial(pgd_loss, **config.attack(), generator=generator)


def _validate(model: nn.Module, val: ImageSet, config: TrainConfig) -> dict[str, float]:
    """Accuracies to choose by; the attack starts from the same points in every epoch."""
    attacks = {}
    if config.method != "none":
        generator = _generator(config, _VALIDATION, 0)
        attacks["robust"] = partial(pgd, **config.attack(), generator=generator)
    accuracies = evaluate(model, val.batches(EVALUATION_BATCH), attacks)
    return {f"val_{name}": value for name, value in accuracies.items()}


def _seed(seed: int, purpose: str, epoch: int) -> int:
    """A seed of its own for every purpose and epoch, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()[:7], "big")


def _generator(config: TrainConfig, purpose: str, epoch: int) -> torch.Generator:
    return torch.Generator(config.device).manual_seed(_seed(config.seed, purpose, epoch))


class _Report:
    """The progress bar, and a line per epoch."""

    # The loss lives on the device; showing it synchronizes, so it is shown rarely.
    _SECONDS_BETWEEN_READS = 0.5

    def __init__(self, epochs: int, images_per_epoch: int, enabled: bool) -> None:
        self.epochs = epochs
        self.enabled = enabled
        self.epoch = 1
        self.validated = ""
        self.read_at = 0.0
        self.bar = None
        if enabled:
            from tqdm import tqdm

            # disable=None: only on a terminal.
            self.bar = tqdm(
                total=epochs * images_per_epoch, unit="img", unit_scale=True, disable=None
            )

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_batch(self, images: int, totals: RunningTotals) -> None:
        if self.bar is None or self.bar.disable:
            return
        self.bar.update(images)
        now = time.monotonic()
        if now - self.read_at >= self._SECONDS_BETWEEN_READS:
            self.read_at = now
            loss, accuracy = totals.means()
            self.bar.set_description(f"epoch {self.epoch}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, train {accuracy:.1%}{self.validated}")

    def on_epoch(self, metrics: dict[str, Any], *, is_best: bool) -> None:
        self.epoch = metrics["epoch"] + 1
        self.validated = f", clean {metrics['val_clean']:.1%}"
        if "val_robust" in metrics:
            self.validated += f", robust {metrics['val_robust']:.1%}"
        if not self.enabled:
            return
        line = (
            f"epoch {metrics['epoch']}/{self.epochs}: loss {metrics['train_loss']:.3f}, "
            f"train {metrics['train_accuracy']:.1%}; validation{self.validated[1:]}; "
            f"{metrics['images_per_second']:,.0f} img/s{' (best)' if is_best else ''}"
        )
        self.bar.write(line)
