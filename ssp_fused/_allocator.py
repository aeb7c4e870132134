"""The C library's memory allocator, which stands behind torch's CPU tensors."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGE = 2**31 - 1  # mallopt takes an int
_STEP = 64 * 2**20
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own


def keep_freed_memory() -> bool:
    """Have the process keep the memory of freed CPU tensors, up to 2 GiB, for the next ones, in large pages.

    glibc gives large blocks back to the system when they are freed; the next tensor then costs a page fault, and
    zeroing, for every 4 KiB of it. A training step frees and allocates its activations over and over. The setting is
    the whole process's and lasts until its end: it is for programs, not for libraries. The environment variables
    ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_`` do the same from outside.

    torch aligns large tensors to pages, and asks the kernel for transparent huge ones, where ``THP_MEM_ALLOC_ENABLE``
    is 1 when the process makes its first tensor. It is set here unless it is set already: with glibc 2.36, chains that
    write over their tensors were faster with it, by fewer addresses in use; plain layers were as fast either way.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE), (_TOP_PAD, _STEP))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)
