"""Seeded faults: kernels made wrong on purpose must fail on the emulated GPU, or under the sanitizers."""

import dataclasses

import pytest
import torch
from accuracy import LARGE_SHAPE
from cuda_on_host import build, emulated, sanitized
from cuda_on_host.build import Patch
from cuda_on_host.emulated import Gpu
from op_judge import Implementation, judge, over

SINGLE = ("batch_norm.cu",)
BARRIER = """\
  __syncthreads();
  for (int i = threadIdx.x; i < kCount * columns; i += threads) {
"""
BLOCK_SUM = "cuda/block_sum.cuh"
FAULTS = {
    "missing barrier": Patch(
        BLOCK_SUM, BARRIER, BARRIER.replace("  __syncthreads();\n", ""), SINGLE
    ),
    "divergent barrier": Patch(
        BLOCK_SUM, BARRIER, BARRIER.replace("  __sync", "  if (threadIdx.x < 32) __sync", 1), SINGLE
    ),
    "missing grid barrier": Patch(
        "cuda/batch_norm.cuh", "SSP_GRID_SYNC();", "__syncthreads();", SINGLE
    ),
    "dropped partial": Patch(
        "cuda/moments.cuh",
        "  const int parts = walk.g.parts;",
        "  const int parts = walk.g.parts - 1;",
        SINGLE,
    ),
    "dropped shift of the means": Patch(
        "cuda/moments.cuh",
        "sums[1] += own.m2 + weighted * shift;",
        "sums[1] += own.m2 + 0 * shift;",
        SINGLE,
    ),
    "swapped coefficient": Patch(
        "cuda/stage.cuh",
        "plus_term(total[e], coefficients[k], term[e])",
        "plus_term(total[e], coefficients[kSlots - 1 - k], term[e])",
        SINGLE,
    ),
}


@pytest.fixture(autouse=True)
def _can_be_built():
    if reason := build.missing():
        pytest.skip(reason)


def judge_batch_norm(module, ops):
    module.configure(**dataclasses.asdict(Gpu()))
    implementation = Implementation(ops, build.missing, seeds=(0,))

    def arguments(i):
        return (*i.stage, *i.affine, 1e-5, 1, None, True)

    results = ("u", "z", "mean", "variance", "rstd")
    given = over(LARGE_SHAPE, torch.float32, "rows", arguments)
    with emulated.poisoned_memory():
        judge(implementation, "stage_batch_norm_act", given, results)
    assert module.take_launches()[-1][-1], "no grid-wide barrier was needed"


def test_the_kernels_without_faults_pass():
    judge_batch_norm(emulated.module(), emulated.OPS)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, tmp_path):
    namespace = f"ssp_fused_{fault.replace(' ', '_')}"
    module = emulated.load(build.build_patched(FAULTS[fault], tmp_path), namespace)
    error, message = AssertionError, "exceeds"
    if fault == "divergent barrier":
        error, message = (
            RuntimeError,
            r"batch_norm_kernel: threads wait .* at __syncthreads \(block_sum",
        )
    with pytest.raises(error, match=message):
        judge_batch_norm(module, getattr(torch.ops, namespace))


STEP = """\
import sys, torch
from pathlib import Path
from cuda_on_host import emulated
emulated.load(Path(sys.argv[1]), "faulty")
x = torch.zeros(1000)
torch.ops.faulty.linf_step(x[:-1], x[:-1], x[1:], 0.1, 0.3, 0.0, 1.0)
print("finished")
"""


def test_off_by_one_is_caught_by_the_sanitizer(tmp_path):
    unit = ("linf_step.cu",)
    whole = "for (int64_t i = begin; i < params.n; ++i)"
    for text, finding in ((whole, ""), (whole.replace("<", "<="), "heap-buffer-overflow")):
        folder = tmp_path / (finding or "right")
        folder.mkdir()
        patched = build.build_patched(
            Patch("cuda/linf_step.cuh", whole, text, unit), folder, sanitize=True
        )
        done = sanitized.run("-c", STEP, str(patched))
        assert ("finished" in done.stdout) == (finding == ""), done.stderr
        assert finding in done.stderr
        if finding:
            assert "linf_step_kernel" in done.stderr
