"""Backends that serve CUDA tensors, and what the ops compute there."""

import pytest
import torch
from op_judge import Implementation, each_tensor

from ssp_fused import available_backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMESPACES = {"triton": torch.ops.ssp_fused_triton, "cuda": torch.ops.ssp_fused}


def implementation(name):
    return Implementation(
        NAMESPACES[name], lambda: available_backends()[name], device="cuda", dtypes=DTYPES
    )


def usable(name):
    """The backend's implementation; skips the test with the backend's own reason where there is none."""
    reason = available_backends()[name]
    if reason is not None:
        pytest.skip(reason)
    return implementation(name)


def outcome(op, arguments):
    """The op's results, or what it wrote into its first three arguments, as a tuple."""
    results = op(*arguments)
    if results is None:
        return arguments[:3]
    return results if isinstance(results, tuple) else (results,)


def copied(arguments):
    """The same arguments in memory of their own."""
    return each_tensor(torch.clone, arguments)


def assert_equal(values, expected):
    """Bit for bit, NaN included."""
    for value, want in zip(values, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
