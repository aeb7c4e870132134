"""The table of ``op_table`` on CUDA tensors, for each backend that is usable there."""

import on_device
import pytest
from op_table import OpTable


@pytest.mark.gpu
class TestTriton(OpTable):
    implementation = on_device.implementation("triton")


@pytest.mark.gpu
class TestCuda(OpTable):
    implementation = on_device.implementation("cuda")
