"""The metrics of a run's epochs, read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .run import METRICS

_KEYS = ("epoch", "lr", "train_loss", "train_accuracy", "val_clean")


def run_history(run_dir: str | Path) -> dict[str, Any]:
    """What a training run has written about the epochs that have ended.

    Args:
        run_dir: a run folder.

    Returns:
        JSON types: "metrics", the file; "epochs", its lines, in order: for each epoch "epoch", "lr",
        "train_loss", "train_accuracy", "val_clean", but for method "none" "val_robust", and times.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a damaged file, or no epoch has ended.
    """
    path = Path(run_dir, METRICS)
    if not path.is_file():
        raise FileNotFoundError(f"no training run in {run_dir}: there is no {path}")
    epochs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            metrics = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        missing = [key for key in _KEYS if not isinstance(metrics, dict) or key not in metrics]
        if missing:
            raise ValueError(f"{path}: line {number} lacks {', '.join(missing)}")
        epochs.append(metrics)
    if not epochs:
        raise ValueError(f"{path}: no epoch has ended yet")
    return {"metrics": str(path), "epochs": epochs}
