"""Memory of freed tensors stays in the process when it is asked to."""

import platform
import subprocess
import sys

import pytest

# Page faults of the last of several tensors of 48 MiB, of which one lives at a time.
FAULTS = """
import resource, torch
{}
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from ssp_fused._allocator import keep_freed_memory; assert keep_freed_memory()"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_tensors_memory_is_the_next_ones():
    faults = {}
    for code in ("", KEEP):
        command = [sys.executable, "-c", FAULTS.format(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[code] = int(done.stdout)
    assert faults[KEEP] < 100 < faults[""]
