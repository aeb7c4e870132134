"""What Triton's interpreter (3.6, 3.7) does wrong or slowly, mended in this process."""

import types

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend():
    interpreter._convert_float = _convert_float
    # A launch has put numpy's functions in the language's place already: once is enough, not once a call.
    interpreter.InterpretedFunction.__call__ = lambda self, *values, **named: self.rewrite()(
        *values, **named
    )
    # Functions of the language that are themselves jitted know it by another name than kernels do.
    names = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda _, patch=interpreter._patch_lang: patch(names)


def _convert_float(value, source, target, rounding, convert=interpreter._convert_float):
    """bfloat16 lies in arrays of uint16; the interpreter's own conversion to it truncates."""
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(value, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        narrow = torch.from_numpy(np.array(value, np.uint16).view(np.int16))
        return narrow.view(torch.bfloat16).float().numpy()
    return convert(value, source, target, rounding)
