"""What every compiled Triton kernel keeps to: no spills, bounded resources, accesses of 16 bytes on the dense paths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .triton_resources import Compiled, Launch

SHARED_BYTES = 48 << 10  # what every architecture gives a block unasked
REGISTERS = 64 << 10  # of a multiprocessor: a block's have to fit
STREAMING_REGISTERS = 128
# One pass over much memory: on the dense paths 16 warps and more at a time keep it busy.
STREAMING = (
    "combine_kernel",
    "normalize_kernel",
    "apply_kernel",
    "moments_kernel",
    "channel_sum_kernel",
    "linf_kernel",
    "l2_kernel",
)
# Operands and results of activation size, by the kernels' names for them.
_READ = ("terms", "dz", "extras", "g", "x_adv", "grad", "x")
_WRITTEN = ("z", "du", "result")
_FORWARD = ("combine_kernel", "normalize_kernel", "moments_kernel", "group_norm_kernel")


def broken(launch: Launch, found: Compiled) -> list[str]:
    """The bounds that a launch's kernel does not keep to, in words; none is right."""
    resources = found.resources
    bounds = [
        (resources.spill_bytes == 0, "registers are spilled"),
        (resources.shared_bytes <= SHARED_BYTES, "more shared memory than a block has"),
        (resources.registers * 32 * launch.warps <= REGISTERS, "more registers than there are"),
    ]
    if is_dense_path(launch):
        read, written, _ = _activations(launch)
        few = launch.name not in STREAMING or resources.registers <= STREAMING_REGISTERS
        bounds += [
            (few, f"more than {STREAMING_REGISTERS} registers"),
            (found.loads[16] >= read, f"loads narrower than 16 bytes, {found.loads}"),
            (found.stores[16] >= written, f"stores narrower than 16 bytes, {found.stores}"),
        ]
    return [text for kept, text in bounds if not kept]


def is_dense_path(launch: Launch) -> bool:
    """Whether lines are whole vectors of 16 bytes, aligned, with no fewer elements in a tile than threads take."""
    arguments = launch.arguments
    _, _, itemsize = _activations(launch)
    if "UNIT" not in arguments or arguments["UNIT"] * itemsize != 16:
        return False
    sizes = ("LINES", "LENGTH", "GROUPS", "SLOTS", "PLACES")
    elements = math.prod(arguments.get(name, 1) for name in sizes)
    enough = elements >= 32 * launch.warps * arguments["UNIT"]
    padded = arguments.get("SLOTS", 1) != arguments.get("PER_GROUP", 1) and arguments["ROWS"]
    return enough and not padded and "unaligned" not in launch.variant


def _activations(launch: Launch) -> tuple[int, int, int]:
    """How many tensors of activation size the kernel reads and writes, and the narrowest one's bytes an element."""
    arguments = launch.arguments
    read = [arguments.get(name) for name in _READ]
    written = [arguments.get(name) for name in _WRITTEN]
    (written if launch.name in _FORWARD else read).append(arguments.get("u"))
    read, written = (list(_tensors(group)) for group in (read, written))
    return len(read), len(written), min((t.itemsize for t in (*read, *written)), default=0)


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value
