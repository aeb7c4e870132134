"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import TrainConfig, build_network

_KEYS = ("model", "network", "config", "epoch", "metrics")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically.

    The file of that name is replaced only once the new one is whole on the disk: a crash, a full
    disk or Ctrl-C leaves the old one as it was.

    Args:
        path: the file; its folder must exist.
        state: tensors and plain Python types, so that it loads with weights_only=True.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # The new name is durable only when the folder is on the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, TrainConfig, dict[str, Any]]:
    """The network of a checkpoint, in eval mode, with its weights.

    Args:
        path: file written by a training run.
        device: where to put the network.

    Returns:
        The network, the settings it was trained with, and the whole checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no checkpoint of a training run; keys missing or foreign
            are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    # Read apart from parsing: what is wrong with the bytes is no error of the file system, but
    # torch reports some of it as one.
    contents = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(contents, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a checkpoint ({_first_line(error)})") from error
    missing = [key for key in _KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of a training run, lacks {', '.join(missing)}")
    model = build_network(state["network"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return model.to(device).eval(), TrainConfig.from_dict(state["config"]), state


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
