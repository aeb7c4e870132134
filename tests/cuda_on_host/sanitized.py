"""Python in a process of its own, with AddressSanitizer in place of its allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import native_build

from . import emulated


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python; anything that a sanitizer finds in a sanitized module ends it with an error."""
    compiler = native_build.find_cxx(os.environ)
    library = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": library,
        # Python itself leaks, and fibers have no fake stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        emulated.SANITIZED: "1",
        "PYTHONPATH": os.pathsep.join([str(native_build.ROOT), str(Path(__file__).parents[1])]),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, cwd=native_build.ROOT, capture_output=True, text=True)
