"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .files import replace_file
from .networks import build_network

BEST, LAST = "best.pt", "last.pt"
_KEYS = ("model", "network", "config", "epoch", "metrics")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: a failure leaves the file of that name as it was.

    Args:
        path: the file; its folder must exist.
        state: tensors and plain Python types, so that it loads with weights_only=True.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(Path(path), lambda file: torch.save(state, file))


def read_tensors(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote to `path`, on the CPU, without running code from it.

    Args:
        path: the file.
        allowed: plain classes that may occur in it besides those torch allows by itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything else than tensors and plain types.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    # Read apart from parsing: what is wrong with the bytes is no error of the file system, but
    # torch reports some of it as one.
    contents = io.BytesIO(path.read_bytes())
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            # What torch has to say about old formats is of no use to a reader of checkpoints.
            warnings.simplefilter("ignore")
            return torch.load(contents, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes reach every corner of the parser
        raise ValueError(f"{path}: not a checkpoint ({_first_line(error)})") from error


def missing_keys(state: Any, *more: str) -> list[str]:
    """What keeps the result of `read_tensors` from being a checkpoint; `more` keys it must have."""
    return [key for key in (*_KEYS, *more) if not isinstance(state, dict) or key not in state]


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, TrainConfig, dict[str, Any]]:
    """The network of a checkpoint, in eval mode, with its weights.

    Args:
        path: file written by a training run or by `ssp-fused convert`.
        device: where to put the network.

    Returns:
        The network, the settings it was trained with, and the whole checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no checkpoint of a training run; keys missing or foreign
            are named.
    """
    path = Path(path)
    state = read_tensors(path)
    missing = missing_keys(state)
    if missing:
        raise ValueError(f"{path}: not a checkpoint of a training run, lacks {', '.join(missing)}")
    try:
        model = build_network(state["network"])
        model.load_state_dict(state["model"])
        config = TrainConfig.from_dict(state["config"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return model.to(device).eval(), config, state


def checkpoint_path(path: str | Path, *, last: bool = False) -> Path:
    """The checkpoint that a run folder, or a checkpoint itself, stands for.

    Args:
        path: a run folder or a checkpoint.
        last: of a run folder the last state, not the one that was best on validation images.

    Raises:
        FileNotFoundError: the folder holds no such checkpoint.
        ValueError: `last` with a checkpoint.
    """
    path = Path(path)
    if path.is_file() or (path.suffix == ".pt" and not path.is_dir()):
        if last:
            raise ValueError(f"last must go with a run folder, got {path}")
        return path
    found = path / (LAST if last else BEST)
    if not found.is_file():
        raise FileNotFoundError(f"no checkpoint {found}")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
