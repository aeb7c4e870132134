"""What a training run shows: a progress bar on a terminal, and a line per epoch."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from .training import RunningTotals


class Progress:
    """The progress bar, and a line per epoch.

    Args:
        epochs: number of epochs in the run.
        images_per_epoch: images trained on in one.
        enabled: whether to show anything; the bar also needs stderr to be a terminal.
        epoch: the epoch the run begins with, or goes on with.
        images: images trained on before.
    """

    # The loss lives on the device; showing it synchronizes, so it is shown rarely.
    _SECONDS_BETWEEN_READS = 0.5

    def __init__(
        self, epochs: int, images_per_epoch: int, enabled: bool, *, epoch: int, images: int
    ) -> None:
        self.epochs = epochs
        self.epoch = epoch
        self.validated = ""
        self.read_at = 0.0
        self.bar = None
        if enabled:
            from tqdm import tqdm

            self.bar = tqdm(
                total=epochs * images_per_epoch,
                initial=images,
                unit="img",
                unit_scale=True,
                disable=None,  # only on a terminal
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_batch(self, images: int, totals: RunningTotals) -> None:
        """Advance the bar by a batch."""
        if self.bar is None or self.bar.disable:
            return
        self.bar.update(images)
        now = time.monotonic()
        if now - self.read_at >= self._SECONDS_BETWEEN_READS:
            self.read_at = now
            result = totals.result()
            self.bar.set_description(f"epoch {self.epoch}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(
                f"loss {result.loss:.3f}, train {result.accuracy:.1%}{self.validated}"
            )

    def on_epoch(self, metrics: dict[str, Any], *, is_best: bool) -> None:
        """Write the line of an epoch that has ended."""
        self.epoch = metrics["epoch"] + 1
        self.validated = f", clean {metrics['val_clean']:.1%}"
        if "val_robust" in metrics:
            self.validated += f", robust {metrics['val_robust']:.1%}"
        if self.bar is not None:
            self.bar.write(
                f"epoch {metrics['epoch']}/{self.epochs}: loss {metrics['train_loss']:.3f}, "
                f"train {metrics['train_accuracy']:.1%}; validation{self.validated[1:]}; "
                f"{metrics['images_per_second']:,.0f} img/s{' (best)' if is_best else ''}"
            )
