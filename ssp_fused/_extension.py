"""The compiled op libraries: loaded on first use, or the reason why one cannot be."""

from __future__ import annotations

import ctypes
import importlib
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
# In a folder of their own: a binary named `_ops` beside the Python module `_ops` would shadow it.
_LIBRARIES = {"ops": _PACKAGE / "_lib" / "ops.so", "cuda": _PACKAGE / "_lib" / "cuda.so"}
_BINARIES = ("_ops", "_cuda", "_C")

_loaded: dict[str, str | None] = {}


def build_info() -> dict:
    """How the binaries were built, and what was left out.

    Returns:
        ``version``, ``torch`` (built against), ``compiler``, ``isas``, ``cuda`` (``built``,
        ``archs``, ``nvcc``) and ``left_out``: of ``_ops``, ``_cuda`` and ``_C`` those that were
        not built, with the reason.
    """
    path = _PACKAGE / "_build_info.json"
    if path.is_file():
        return json.loads(path.read_text())
    return {
        "version": None,
        "torch": None,
        "compiler": None,
        "isas": [],
        "cuda": {"built": False, "archs": None, "nvcc": None},
        "left_out": dict.fromkeys(_BINARIES, "this source tree was never built or installed"),
    }


@torch.compiler.assume_constant_result
def load(library: str) -> str | None:
    """Load the library ``"ops"`` (CPU kernels) or ``"cuda"`` (CUDA kernels), once.

    Returns:
        None if its kernels are registered now, else the reason why they cannot be.
    """
    if library not in _loaded:
        _loaded[library] = _load(library)
    return _loaded[library]


def _load(library: str) -> str | None:
    path = _LIBRARIES[library]
    if not path.is_file():
        reason = build_info()["left_out"].get(f"_{library}", f"there is no {path}")
        return f"the library _{library} is missing: {reason}"
    if library == "cuda" and torch.version.cuda is None:
        return f"the library _cuda needs a CUDA build of torch, which {torch.__version__} is not"
    # The schemas have to be declared before a library registers kernels for them.
    importlib.import_module("._ops", __package__)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load into torch {torch.__version__}: {error}"
    return None


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use ("avx512", "avx2" or "baseline"), None without kernels.

    The best one this processor has, or the one that the environment variable ``SSP_FUSED_CPU_ISA`` names (None too
    where it names one that cannot be used: a kernel's call says so).
    """
    if load("ops") is not None:
        return None
    name = ctypes.CDLL(str(_LIBRARIES["ops"])).ssp_fused_cpu_isa
    name.restype = ctypes.c_char_p
    value = name()
    return None if value is None else value.decode()
