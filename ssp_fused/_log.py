"""The package's log, and what is said in it once."""

from __future__ import annotations

import logging

import torch

LOG = logging.getLogger("ssp_fused")
_said: set[str] = set()


def warn_once(message: str) -> None:
    """Log the message, unless it was before; nothing where a compiler traces."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        LOG.warning(message)
