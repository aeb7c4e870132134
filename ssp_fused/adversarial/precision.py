"""Automatic mixed precision of a training run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """What autocast computes in, and the scaling of losses that gradients in fp16 need.

    Attributes:
        scaler: a GradScaler; one that changes nothing, except with "fp16".

    Args:
        name: of `PRECISIONS`; "none" computes in the types of the parameters.
        device: type of the device, "cpu" or "cuda".
    """

    def __init__(self, name: str = "none", device: str = "cpu") -> None:
        self._device = device
        self._dtype = PRECISIONS[name]
        self.scaler = torch.amp.GradScaler(device, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, self._dtype)
