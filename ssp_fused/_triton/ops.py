"""Registration of the ops as ``ssp_fused_triton::op``, for CUDA tensors; for CPU tensors where kernels are interpreted.

Another namespace than the compiled libraries': a second implementation of an op for one device would silently
replace the first.
"""

from __future__ import annotations

import triton

from .._ops import SCHEMAS, declare
from . import backward, forward, reductions, steps

NAMESPACE = "ssp_fused_triton"
OPS = {
    name: getattr(module, name)
    for module in (forward, backward, reductions, steps)
    for name in SCHEMAS
    if hasattr(module, name)
}
INTERPRETED = triton.knobs.runtime.interpret

_LIBRARY = declare(NAMESPACE)
for _name, _function in OPS.items():
    for _device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _LIBRARY.impl(_name, _function, _device)
