"""Scalars of a run's epochs for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TAGS = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "val_clean": "accuracy/validation_clean",
    "val_robust": "accuracy/validation_robust",
    "lr": "lr",
}


def check_tensorboard() -> None:
    """Find out that there is no TensorBoard before there is something to write.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise ImportError("tensorboard needs that package: pip install tensorboard") from error


@contextmanager
def epoch_scalars(
    folder: Path, history: Sequence[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes an epoch's loss, accuracies and learning rate.

    Args:
        folder: where event files are; those of the run's earlier parts are continued.
        history: the metrics of the epochs that have ended.
    """
    from torch.utils.tensorboard import SummaryWriter

    # The last epoch is written again, and what comes behind it dropped: a run that died may have
    # saved its state and not written its scalars.
    writer = SummaryWriter(str(folder), purge_step=max(len(history), 1))

    def write(metrics: dict[str, Any]) -> None:
        for key, tag in _TAGS.items():
            if key in metrics:
                writer.add_scalar(tag, metrics[key], metrics["epoch"])
        writer.flush()

    try:
        for metrics in history[-1:]:
            write(metrics)
        yield write
    finally:
        writer.close()
