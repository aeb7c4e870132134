"""The Triton backend is imported when it is asked for, and says why where it cannot be used."""

import subprocess
import sys

import pytest
import torch

import ssp_fused

NO_TRITON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Refuse())
import torch
import ssp_fused
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_the_package_works_without_triton():
    out = run(
        NO_TRITON
        + """
print(ssp_fused.available_backends()["triton"])
block = ssp_fused.nn.SSPBlock(4, "ssp22")
block(torch.randn(2, 4, 5, 5)).sum().backward()
try:
    ssp_fused.use_backend("triton")
except RuntimeError as error:
    print(error)
"""
    ).stdout.splitlines()
    reason = "Triton cannot be imported: No module named 'triton'"
    assert out == [reason, f"backend 'triton' is not usable here: {reason}"]


def test_importing_the_package_does_not_import_the_kernels():
    code = "import sys, ssp_fused; print([m for m in sys.modules if 'ssp_fused._triton' in m])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    pytest.importorskip("triton")
    assert ssp_fused.available_backends()["triton"] == "torch sees no CUDA device"
    message = "backend 'triton' is not usable here: torch sees no CUDA device"
    with pytest.raises(RuntimeError, match=message):
        ssp_fused.use_backend("triton")
