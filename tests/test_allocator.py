"""Memory of freed tensors stays in the process when it is asked to."""

import json
import os
import platform
import subprocess
import sys

import pytest

# Page faults of a tensor of 48 MiB after others, of which one lives at a time: the fewest, since a system that is short
# of memory takes pages away, and adds some.
FAULTS = """
import resource, torch
{}
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))
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


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
@pytest.mark.parametrize("wish", [None, "0"])
def test_large_tensors_begin_at_a_page_unless_the_environment_says_otherwise(wish):
    # Alive together and of sizes that are no whole pages: were one at a page by chance, the others are not.
    tensors = "tensors = [torch.empty(10**6 + 100 * k) for k in range(8)]"
    code = f"{KEEP}; import torch; {tensors}; print([t.data_ptr() % 4096 for t in tensors])"
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": wish} if wish else {}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert any(json.loads(done.stdout)) == (wish == "0")
