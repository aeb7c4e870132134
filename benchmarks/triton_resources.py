"""Resources of the Triton kernels, compiled ahead of time: no GPU and no driver is needed.

What is compiled are the ops' own launches over a table of problems, recorded in place of being run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ssp_fused import _layout, _ops

from .harness import CannotRunError
from .resources import Resources

ARCHS = (80, 90, 100)
MULTIPROCESSORS = 132
_IDENTITY, _RELU, _LEAKY_RELU, _SILU = range(len(_ops.ACTIVATIONS))
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
# [N, C, *spatial]: the published networks', wide ones, odd ones, and one past 2^31 elements.
SHAPES = (
    (128, 16, 32, 32),
    (128, 64, 8, 8),
    (64, 640, 8, 8),
    (256, 128, 56, 56),
    (16, 24, 7, 7),
    (8, 65, 14, 14),
    (64, 512),
    (1024, 64, 256, 257),
)
# Of a stage's first operand, and of what is narrower.
STORAGES = ((_F32, _F32), (_BF16, _BF16), (_F16, _F16), (_F32, _BF16))


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, and the problem that it belongs to."""

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    warps: int
    registers: int | None
    problem: str

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    @functools.cached_property
    def choices(self) -> frozenset[tuple]:
        """Each of the specialisation's values, with the layout that it is for."""
        rows = self.arguments.get("ROWS")
        return frozenset((rows, choice) for choice in self.specialisation)

    @functools.cached_property
    def specialisation(self) -> tuple[tuple[str, Any], ...]:
        """What Triton compiles anew for: constants, dtypes, alignment, absence, and the width of integers."""
        values = [
            (p.name, _key(self.arguments[p.name], p.is_constexpr)) for p in self.kernel.params
        ]
        return (("warps", self.warps), *values)

    @property
    def variant(self) -> str:
        """The specialisation in words: constants, and what stands for each pointer."""
        return " ".join(f"{name}={value}" for name, value in self.specialisation if value != "-")


def _key(value: Any, constant: bool) -> Any:
    if constant or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, Tensor):
        return str(value.dtype)[6:] + ("" if value.data_ptr() % 16 == 0 else "(unaligned)")
    if isinstance(value, tuple):
        return "(" + ",".join(_key(v, False) for v in value) + ")"
    # No integer is specialised by value; the kernels say so.
    return "int64" if isinstance(value, int) and not -(2**31) <= value < 2**31 else "-"


def launches() -> list[Launch]:
    """Every distinct specialisation that the launch table chooses over the table of problems."""
    try:
        from ssp_fused._triton import launch as table
        from ssp_fused._triton import operands, ops
    except ImportError as error:
        raise CannotRunError(f"Triton cannot be imported: {error}") from error
    if ops.INTERPRETED:
        raise CannotRunError("TRITON_INTERPRET is set: nothing is compiled")
    found: dict[tuple, Launch] = {}
    problem = ""

    def record(kernel, like, programs, arguments, warps, registers=None):
        launch = Launch(kernel, arguments, programs, warps, registers, problem)
        found.setdefault((launch.name, launch.specialisation), launch)

    device = table.Device(MULTIPROCESSORS)
    with (
        mock.patch.object(operands, "launch", record),
        mock.patch.object(operands, "_INTERPRETED", device),
    ):
        for name, problem, arguments in _problems():  # noqa: B007 - record reads it
            ops.OPS[name](*arguments)
    return list(found.values())


def _problems() -> Iterator[tuple[str, str, tuple]]:
    """An op's name, what the problem is, its arguments: tensors without data."""
    for shape, rows, storage in itertools.product(SHAPES, (False, True), STORAGES):
        if rows and len(shape) == 2:
            continue
        layout = "rows" if rows else "planes"
        text = f"{'x'.join(map(str, shape))} {layout} {'/'.join(str(d)[6:] for d in storage)}"
        for name, arguments in _calls(shape, rows, *storage):
            yield name, text, arguments
    yield from (
        (name, "unaligned", arguments)
        for name, arguments in _calls((128, 16, 32, 32), False, _F32, _F32, offset=1)
    )
    c = _vector(64)
    means = torch.empty(3, 64, device="meta")
    tracked = torch.zeros((), dtype=torch.int64, device="meta")
    for momentum in (0.1, None):
        update = (c, c, tracked, means, means, 7.0, None, momentum)
        yield "update_running_stats_", "3 uses of 64 channels", update


def _vector(*sizes: int) -> Tensor:
    return torch.empty(sizes, device="meta")


def _activation(shape: Sequence[int], dtype: torch.dtype, rows: bool, offset: int) -> Tensor:
    count = torch.Size(shape).numel()
    flat = torch.empty(count + offset, dtype=dtype, device="meta")
    return flat.as_strided(shape, _layout.dense_strides(shape, rows), offset)


def _calls(
    shape: Sequence[int], rows: bool, stored: torch.dtype, narrow: torch.dtype, offset: int = 0
) -> Iterator[tuple[str, tuple]]:
    n, c = shape[:2]
    first, other = (_activation(shape, d, rows, offset) for d in (stored, narrow))
    v = _vector(c)
    norm = (v, v, v, v)
    divisors = [g for g in (1, 8, 13, 32, c) if c % g == 0]
    for count in (1, 2, 3, 6):
        stage = ([first, *[other] * (count - 1)], [0.5] * count, None)
        yield "stage_combine", (*stage, None)
        yield "stage_combine", (*stage, v)
        for code in _activations(count):
            bits = code in (_RELU, _LEAKY_RELU)
            yield "stage_norm_act", (*stage, v, *norm, code, narrow, count > 1, bits)
        yield "stage_batch_norm_act", (*stage, v, v, v, 1e-5, _RELU, narrow, True)
        for groups, code in itertools.product(divisors, _activations(count)):
            rest = (groups, v, v, 1e-5, code, narrow, True)
            yield "stage_group_norm_act", (*stage, v, *rest)
    mask = _vector(*_layout.mask_shape(shape, rows)).to(torch.uint8)
    extra_counts = [(count, code) for count in (0, 1, 2, 6) for code in _activations(count)]
    for count, code in extra_counts:
        extras = ([first] * count, [0.5] * count, None)
        dz = (other, 1.0, None)
        yield "batch_norm_act_backward", (*dz, first, *norm, code, *extras, True)
        for groups in divisors:
            table = _vector(n, groups)
            rest = (v, table, table, v, v, code, *extras, True)
            yield "group_norm_act_backward", (*dz, first, *rest)
        given = (code, None, None, 1.0, None, *extras)
        yield "norm_act_backward", (*dz, first, None, *norm, *given, None)
        if code in (_RELU, _LEAKY_RELU):
            yield "norm_act_backward", (*dz, None, mask, None, *norm[1:], *given, stored)
    yield "channel_sum", (other,)
    yield "stage_dots", (first, [other] * 3)
    for name in ("linf_step", "l2_step"):
        yield name, (other, other, other, 0.1, 0.3, 0.0, 1.0)


def _activations(operands: int) -> tuple[int, ...]:
    """Which to compile: all of them for one operand; a sign and an exponential, which are the dearest, for more."""
    every = (_IDENTITY, _RELU, _LEAKY_RELU, _SILU)
    return every if operands == 1 else (_RELU, _SILU)


def covering(candidates: Sequence[Launch]) -> list[Launch]:
    """Few launches that make, between them, every choice that any launch of the same kernel makes in its layout.

    A choice is one value of what Triton specialises for. All launches would take hours to compile.
    """
    missing: dict[str, set[tuple]] = {}
    for launch in candidates:
        missing.setdefault(launch.name, set()).update(launch.choices)
    chosen = []
    for name, left in missing.items():
        own = [launch for launch in candidates if launch.name == name]
        while left:
            best = max(own, key=lambda launch: len(launch.choices & left))
            left -= best.choices
            chosen.append(best)
    return chosen


class _Target:
    """Stands for Triton's driver: a device of the architecture, on which nothing can be launched.

    Binaries are cached by device index, so each architecture is an index of its own.
    """

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """Triton compiles for ``arch`` (90 for sm_90) until the block ends."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", _Target(arch)):
        yield


@dataclass(frozen=True)
class Compiled:
    """A launch's kernel, compiled.

    Attributes:
        loads, stores: how many of the program text's global accesses have which width in bytes.
        binary: Triton's, with its texts in ``asm``.
    """

    resources: Resources
    loads: Counter[int]
    stores: Counter[int]
    binary: Any


def compiled(launch: Launch, arch: int) -> Compiled:
    """Compile a launch's kernel, under :func:`target`, and read what its assembler says."""
    from ssp_fused._triton import operands

    launch.kernel.device_caches.clear()  # a binary that is there already comes without a log
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder, TRITON_DUMP_PTXAS_LOG="1"),
        contextlib.redirect_stdout(log),
    ):
        binary = launch.kernel.warmup(
            **launch.arguments,
            grid=(launch.programs,),
            **operands.compile_options(launch.warps, launch.registers),
        )

    def number(pattern: str) -> int:
        return int(re.search(pattern, log.getvalue()).group(1))

    text = binary.asm["ptx"]
    loads, stores = (_widths(text, kind) for kind in ("ld", "st"))
    resources = Resources(
        backend="triton",
        kernel=launch.name,
        variant=launch.variant,
        arch=f"sm_{arch}",
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared_bytes=binary.metadata.shared,
        access_bytes=max([*loads, *stores], default=None),
    )
    return Compiled(resources, loads, stores, binary)


def _widths(text: str, kind: str) -> Counter[int]:
    """Bytes of each global load ("ld") or store ("st") in a program text."""
    pattern = rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    return Counter(int(v or 1) * int(bits) // 8 for v, bits in re.findall(pattern, text))


def rows() -> Iterator[Resources]:
    """The covering launches' kernels for each architecture.

    Raises:
        CannotRunError: Triton is not installed.
    """
    chosen = covering(launches())
    for arch in ARCHS:
        with target(arch):
            for launch in chosen:
                yield compiled(launch, arch).resources
