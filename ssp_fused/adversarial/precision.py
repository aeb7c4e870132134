"""Automatic mixed precision of a training run, and the full precision of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it products of float32 are not rounded to TF32 or bf16, and autocast is off."""
    backends = torch.backends
    places = (
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    )
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
