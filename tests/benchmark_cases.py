"""What the tests of the benchmarks share: a small case, and contenders measured on it."""

import pytest
import torch

import ssp_fused
from benchmarks import harness
from benchmarks.cases import CONTIGUOUS, TRAIN, Case

CPU = torch.device("cpu")
needs_cpu_kernels = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)
FEW = harness.Settings(repeats=2, warmup=0)


def small_case(direction=TRAIN, *, dtype="float64", scheme="ssp22", count=1, shape=(3, 4, 5, 6)):
    return Case(scheme, shape, count, dtype, CONTIGUOUS, direction, CPU)


def measured(case, entrants):
    task = harness.Task("test", case.name, case.direction, CPU, case.logical_bytes(), entrants)
    return {row.contender: row for row in harness.measure(task, FEW)}
