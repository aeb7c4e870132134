"""The CUDA library's own sources, kernels and host code, on an emulated GPU, held against the reference."""

import dataclasses

import pytest
import torch
from cuda_on_host import build, emulated
from cuda_on_host.emulated import Gpu
from op_judge import Implementation
from op_table import OpTable

IMPLEMENTATION = Implementation(emulated.OPS, build.missing, dtypes=emulated.DTYPES)


class OnGpu(OpTable):
    implementation = IMPLEMENTATION
    gpu = Gpu()

    @pytest.fixture(autouse=True)
    def _gpu(self, _usable):
        emulated.module().configure(**dataclasses.asdict(self.gpu))


class TestSingleLaunch(OnGpu):
    gpu = Gpu()


class TestTwoLaunches(OnGpu):
    gpu = Gpu(multiprocessors=3, cooperative=False, order="shuffled", seed=1)
