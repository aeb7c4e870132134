"""The emulated ops for tests: ``ssp_fused_emulated::op`` on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from ssp_fused import _ops

from . import build

OPS = torch.ops.ssp_fused_emulated
# Set for a process that has AddressSanitizer loaded.
SANITIZED = "SSP_FUSED_TEST_SANITIZED"
# The CUDA kernels serve no float64.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_libraries: list[torch.library.Library] = []


@dataclass(frozen=True)
class Gpu:
    """The GPU that is emulated; its blocks, and the threads of a block, run in the given order."""

    multiprocessors: int = 4
    blocks_per_multiprocessor: int = 1
    shared_bytes: int = 64 << 10
    cooperative: bool = True
    order: str = "forward"
    seed: int = 0


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    cooperative: bool


def load(path: Path, namespace: str) -> ModuleType:
    """A built module, its ops registered in a namespace."""
    # pybind11 gives back the module that it knows by this name, whatever the file.
    spec = importlib.util.spec_from_file_location(f"{namespace}.{build.NAME}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _libraries.append(_ops.declare(namespace))
    module.add_to(namespace)
    return module


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN: what a kernel leaves out, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@functools.cache
def module() -> ModuleType:
    """The module of the sources as they are; its ops are ``OPS``."""
    return load(build.build(sanitize=SANITIZED in os.environ), OPS.name)


def launches_on(gpu: Gpu, op: str, arguments: Sequence) -> tuple[object, list[Launch]]:
    """The results of an op on a GPU, and its launches."""
    module().configure(**asdict(gpu))
    module().take_launches()
    results = getattr(OPS, op)(*arguments)
    return results, [Launch(*launch) for launch in module().take_launches()]
