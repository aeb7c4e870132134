"""The table of ``op_table`` for the CPU kernels."""

import torch
from op_judge import Implementation
from op_table import OpTable

from ssp_fused import available_backends


class TestCpu(OpTable):
    implementation = Implementation(torch.ops.ssp_fused, lambda: available_backends()["cpu"])
