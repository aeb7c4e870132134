"""The scalar functions that the CPU and CUDA kernels share, one value at a time, through ``_C``."""

import importlib
import itertools
import math

import pytest
import torch

from ssp_fused import _extension, _ops, reference

LEFT_OUT = _extension.build_info()["left_out"].get("_C")
pytestmark = pytest.mark.skipif(LEFT_OUT is not None, reason=f"no _C: {LEFT_OUT}")

ARITHMETIC = pytest.mark.parametrize(
    ("name", "dtype"), [("math32", torch.float32), ("math64", torch.float64)]
)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)
ACTIVATIONS = range(len(_ops.ACTIVATIONS))


def functions(name="math64"):
    return getattr(importlib.import_module("ssp_fused._C"), name)


def agree(result, expected, dtype, ulps=0):
    rtol = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(
        torch.tensor(result, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=torch.finfo(dtype).tiny if ulps else 0,
        equal_nan=True,
    )


def sample(dtype):
    drawn = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=dtype) * 8
    return drawn.tolist()


@ARITHMETIC
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=_ops.ACTIVATIONS)
def test_activation(activation, name, dtype):
    values = [*SPECIAL, *sample(dtype)]
    exact = reference.activate(torch.tensor(values, dtype=torch.float64), activation)
    result = [functions(name).activate(activation, value) for value in values]
    agree(result, exact, dtype, ulps=4)


@ARITHMETIC
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=_ops.ACTIVATIONS)
def test_activation_backward(activation, name, dtype):
    values = [math.nan, 0.0, -0.0, *sample(dtype)]
    y = torch.tensor(values, dtype=torch.float64)
    exact = reference.activation_backward(torch.full_like(y, 0.75), y, activation)
    result = [functions(name).activation_backward(activation, 0.75, value) for value in values]
    # silu' crosses zero near -1.28, where its relative error has no bound.
    slack = 0 if activation != _ops.ACTIVATIONS.index("silu") else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        torch.tensor(result, dtype=torch.float64),
        exact,
        rtol=8 * torch.finfo(dtype).eps,
        atol=slack,
        equal_nan=True,
    )


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be 0 to 3, but is 4"):
        functions().activate(4, 1.0)


@ARITHMETIC
def test_linf_step(name, dtype):
    step = (0.1, 0.25, -0.5, 1.0)
    for operands in itertools.product((*SPECIAL, 0.3, -2.0, 0.9), repeat=3):
        tensors = [torch.tensor(value, dtype=dtype) for value in operands]
        agree(
            functions(name).linf_step(*operands, *step), reference.linf_step(*tensors, *step), dtype
        )


def test_merge_of_moments():
    merge = importlib.import_module("ssp_fused._C").merge
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4

    def moments(part):
        count = len(part)
        mean = part.mean().item() if count else 0.0
        return mean, (part - mean).square().sum().item(), float(count)

    for cut in (0, 1, 37, 99, 100):
        merged = merge(moments(values[:cut]), moments(values[cut:]))
        torch.testing.assert_close(
            torch.tensor(merged, dtype=torch.float64),
            torch.tensor(moments(values), dtype=torch.float64),
            rtol=1e-11,
            atol=0,
        )
