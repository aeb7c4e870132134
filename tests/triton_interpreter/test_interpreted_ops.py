"""The table of ``op_table`` for the Triton kernels, interpreted."""

import torch
from op_judge import Implementation
from op_table import OpTable

from ssp_fused import available_backends


class TestTritonInterpreted(OpTable):
    implementation = Implementation(
        torch.ops.ssp_fused_triton,
        lambda: available_backends()["triton"],
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )


def test_the_interpreter_rounds_to_bfloat16():
    """To nearest, ties to even, as the device does."""
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(2.0**-140)])
    ops = torch.ops.ssp_fused_triton
    terms = [values[:, None], torch.zeros(5, 1, dtype=torch.bfloat16)]
    norm = (torch.zeros(1), torch.ones(1), None, None)
    z = ops.stage_norm_act(terms, [1.0, 1.0], None, None, *norm, 0, torch.bfloat16, True, False)[1]
    assert torch.equal(z[:, 0], values.bfloat16())
