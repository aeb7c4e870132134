"""What a compiled GPU kernel takes of a multiprocessor, as its compiler reports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """One kernel in one specialisation for one architecture.

    Attributes:
        backend: "triton" or "cuda".
        kernel, variant: its name, and what it is specialised for.
        arch: such as "sm_90".
        registers: a thread.
        spill_bytes: stores and loads of registers that do not fit, a thread.
        shared_bytes: of static shared memory, a block.
        access_bytes: width of its widest global access, None where it is not known.
    """

    backend: str
    kernel: str
    variant: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    access_bytes: int | None
