"""Registers, spills and access widths of the CUDA kernels of the library built in this tree."""

from collections import Counter

import pytest

from benchmarks import cuda_resources
from ssp_fused import _extension


@pytest.fixture(scope="module")
def kernels():
    if "_cuda" in _extension.build_info()["left_out"]:
        pytest.skip(_extension.build_info()["left_out"]["_cuda"])
    found = [resources for _, resources in cuda_resources.kernels()]
    return found or pytest.skip("the library was not built in this tree")


def test_kernels_are_compiled_for_every_architecture(kernels):
    variants = Counter((k.kernel, k.variant) for k in kernels)
    archs = _extension.build_info()["cuda"]["archs"].split(";")
    assert {k.arch for k in kernels} == {f"sm_{arch.partition('+')[0]}" for arch in archs}
    assert set(variants.values()) == {len(archs)}


def test_kernels_do_not_spill_registers(kernels):
    assert not [kernel for kernel in kernels if kernel.spill_bytes]


CODE = """\
Fatbin elf code:
arch = sm_90
\t\tFunction : _Z5firstv
        /*0130*/                   LDG.E.U16.CONSTANT R5, desc[UR4][R2.64] ;
        /*0140*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0150*/                   STG.E desc[UR4][R2.64], R4 ;
\t\tFunction : _Z6secondv
        /*0010*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0020*/                   LDS.128 R4, [R2] ;
arch = sm_100
\t\tFunction : _Z5firstv
        /*0010*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
"""


def test_access_widths(monkeypatch, tmp_path):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{CODE}END\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cuda_resources, "find_cuobjdump", lambda: tool)
    assert cuda_resources.access_widths(tmp_path / "library") == {
        ("sm_90", "_Z5firstv"): 16,
        ("sm_90", "_Z6secondv"): 4,
        ("sm_100", "_Z5firstv"): 1,
    }
    monkeypatch.setattr(cuda_resources, "find_cuobjdump", lambda: None)
    assert cuda_resources.access_widths(tmp_path / "library") == {}
