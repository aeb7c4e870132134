"""Launch parameters, chosen from shape, layout, dtypes and device in plain Python.

A fixed table, from measurements on an H200 (docs/kernels.md): tiles hold so much that enough bytes are in flight
whatever the number of operands, and every choice is a power of two, so that few kernels are compiled. No autotuning:
nothing here depends on data or on time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

WARP = 32
_REGISTERS = 65536  # of a multiprocessor, since compute capability 7.0
_REGISTERS_OF_A_THREAD = 255
_STREAMING_WARPS = 16  # that a multiprocessor holds where an op passes once over much memory
VECTOR_BYTES = 16  # the widest access of a thread
_LINE = 8  # no tile is shorter: a byte of the mask
_LONGEST = 1 << 31  # lines are shorter: kernels count their elements in 32 bits
_CACHE_LINE = 128  # bytes
_BYTES_OF_OPERAND = 32  # that a thread reads at once: two vectors

# Eager steps on small tensors take the host's time: no choice is made twice.
_remembered = functools.lru_cache(maxsize=1024)


@dataclass(frozen=True)
class Device:
    """What the table asks of a device."""

    multiprocessors: int


@dataclass(frozen=True)
class Matrix:
    """An activation as dense matrices ``[samples, lines, length]``.

    Attributes:
        channels: columns of the matrix in rows, lines (of one sample) in planes.
        batch: a sum's samples that share a matrix in planes: it moves from one to the next.
    """

    samples: int
    lines: int
    length: int
    channels: int
    rows: bool
    batch: int = 1


@dataclass(frozen=True)
class Tile:
    """A program's tile of a matrix.

    Attributes:
        unit: the length is a multiple of it, as far as accesses of 16 bytes can use that.
    """

    lines: int
    length: int
    unit: int
    warps: int


@dataclass(frozen=True)
class Pointwise:
    """A launch in which every tile is a program's.

    Attributes:
        registers: the most that a thread gets.
    """

    tile: Tile
    programs: int
    registers: int


@dataclass(frozen=True)
class Sweep:
    """A launch of sums over all but the channels.

    Attributes:
        splits: programs among which the steps of a sweep are shared.
        slots: shares of each channel's sum.
    """

    tile: Tile
    splits: int
    slots: int
    programs: int


@dataclass(frozen=True)
class Merge:
    """A launch that adds up shares ``[slots, width]``: ``parts`` at a time, for ``width`` channels a program."""

    parts: int
    width: int
    warps: int
    programs: int


@dataclass(frozen=True)
class Groups:
    """A launch that keeps whole groups of a sample on chip.

    Attributes:
        groups: of a program.
        slots: for the channels of a group, a power of two.
        places: for the positions of a sample, a power of two.
        unit: as that of ``Tile``.
    """

    groups: int
    slots: int
    places: int
    unit: int
    warps: int
    programs: int


def registers(warps: int) -> int:
    """All that a thread can have: told nothing, the assembler may spill a few to make room for more programs."""
    return min(_REGISTERS // (warps * WARP), _REGISTERS_OF_A_THREAD)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@_remembered
def pointwise_matrix(
    shape: tuple[int, ...], rows: bool, *, per_sample: bool = False, bits: bool = False
) -> Matrix:
    """The matrix of an op that treats elements by their channel (and sample) alone.

    Args:
        shape: ``[N, C, *spatial]``.
        rows: the layout.
        per_sample: whether statistics differ from sample to sample.
        bits: whether mask bits are involved, whose lines are planes even where these have one element.
    """
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    if rows or (s == 1 and not bits):
        samples = n if per_sample else 1
        return Matrix(samples, n * s // samples, c, c, True)
    return Matrix(1, n * c, s, c, False)


@_remembered
def flat_matrix(shape: tuple[int, ...]) -> Matrix:
    """The matrix of an op that knows no channels: one line, or one a sample where that would be too long."""
    lines = 1 if math.prod(shape) < _LONGEST else shape[0]
    return Matrix(1, lines, math.prod(shape) // lines, 1, False)


@_remembered
def sweep_matrix(shape: tuple[int, ...], rows: bool, *, per_sample: bool = False) -> Matrix:
    """The matrix of a sum over all but the channels, or (``per_sample``) over the positions alone."""
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    samples = n if per_sample else 1
    if rows or s == 1:
        return Matrix(samples, n * s // samples, c, c, True)
    return Matrix(samples, c, s, c, False, n // samples)


def unit(length: int, itemsize: int) -> int:
    """How many elements of the narrowest operand a thread may access at once."""
    return math.gcd(length, VECTOR_BYTES // itemsize)


def tile(matrix: Matrix, elements: int, itemsize: int, warps: int) -> Tile:
    """A tile of at most so many elements."""
    if matrix.rows:
        length = _columns(matrix.length)
    else:
        length = min(max(power_of_two(matrix.length), _LINE), elements)
    lines = min(max(elements // length, 1), power_of_two(matrix.lines))
    return Tile(lines, length, unit(matrix.length, itemsize), warps)


def _columns(channels: int) -> int:
    """The widest tile of a row that wastes little; several lines of it let a thread use channels' values again."""
    widths = [w for w in (256, 128, 64, 32) if w < 2 * channels] or [
        max(power_of_two(channels), _LINE)
    ]
    padded = [cdiv(channels, w) * w for w in widths]
    return next(w for w, p in zip(widths, padded, strict=True) if p <= 1.125 * min(padded))


@_remembered
def pointwise(
    matrix: Matrix, operands: int, itemsize: int, widest: int, device: Device
) -> Pointwise:
    """The launch of an op that reads so many operands.

    Args:
        matrix: What it treats.
        operands: Read in one pass.
        itemsize: Bytes of an element of the narrowest of them.
        widest: Of the widest.
        device: That it runs on.
    """
    warps = 4
    per_thread = 8 if operands > 4 else _BYTES_OF_OPERAND // widest
    while True:
        chosen = tile(matrix, per_thread * warps * WARP, itemsize, warps)
        programs = (
            matrix.samples * cdiv(matrix.lines, chosen.lines) * cdiv(matrix.length, chosen.length)
        )
        if per_thread == 8 or programs >= device.multiprocessors:
            # Narrower accesses take a pair of registers each for their addresses.
            vectors = chosen.unit * itemsize == VECTOR_BYTES
            most = registers(_STREAMING_WARPS if vectors else warps)
            return Pointwise(chosen, programs, most)
        per_thread //= 2


@_remembered
def sweep(matrix: Matrix, operands: int, itemsize: int, widest: int, device: Device) -> Sweep:
    """The launch of a sum over all but the channels, in the terms of ``pointwise``."""
    warps = 4 if matrix.rows or operands == 1 or widest > 2 else 8
    # Accesses of single elements take a pair of registers each for their addresses.
    narrow = unit(matrix.length, itemsize) == 1
    many = _BYTES_OF_OPERAND * (2 if operands == 1 else 1)
    per_thread = 8 if narrow or operands > 4 else many // widest
    chosen = tile(matrix, per_thread * warps * WARP, itemsize, warps)
    columns = cdiv(matrix.length, chosen.length)
    if matrix.rows:
        tiles, steps = columns, cdiv(matrix.lines, chosen.lines)
    else:
        tiles, steps = columns * cdiv(matrix.lines, chosen.lines), matrix.batch
    tiles *= matrix.samples
    # Shares have to be added up: a program of a small tensor takes several steps, while none is without work.
    programs = min(max(tiles * steps // 8, device.multiprocessors), 4 * device.multiprocessors)
    wanted = min(cdiv(programs, tiles), steps)
    splits = cdiv(steps, cdiv(steps, wanted))  # as many steps for each
    slots = splits if matrix.rows else splits * columns
    return Sweep(chosen, splits, slots, splits * tiles)


@_remembered
def merge(tables: int, parts: int, channels: int, device: Device) -> Merge:
    """The launch that adds up so many shares of each channel, in each of the tables."""
    width = min(max(power_of_two(tables * channels // device.multiprocessors), 4), 64)
    height = min(max(power_of_two(parts), 64), 8192 // width)
    warps = min(height * width // (WARP * 8), 8)
    return Merge(height, width, max(warps, 1), tables * cdiv(channels, width))


@_remembered
def groups(matrix: Matrix, num_groups: int, itemsize: int, capacity: int) -> Groups | None:
    """The launch that keeps whole groups on chip, at most ``capacity`` elements; None where one is too large.

    In rows also where a program would read less than a cache line of each row.
    """
    per_group = matrix.channels // num_groups
    slots = power_of_two(per_group)
    positions = matrix.lines if matrix.rows else matrix.length
    places = max(power_of_two(positions), 1 if matrix.rows else _LINE)
    together = min(power_of_two(num_groups), max(4096 // (slots * places), 1))
    if matrix.rows:
        piece = cdiv(min(_CACHE_LINE, matrix.channels * itemsize), slots * itemsize)
        together = max(together, min(power_of_two(piece), power_of_two(num_groups)))
    elements = together * slots * places
    narrow = unit(matrix.length, itemsize) == 1
    if elements > (min(capacity, 4096) if narrow else capacity):
        return None
    gaps = matrix.rows and slots != per_group  # between groups, which no access spans
    per_thread = 8 if narrow or gaps else 16
    warps = min(max(power_of_two(elements // (WARP * per_thread)), 2), 16)
    programs = matrix.samples * cdiv(num_groups, together)
    return Groups(together, slots, places, unit(matrix.length, itemsize), warps, programs)


@_remembered
def group_table(num_groups: int, per_group: int, samples: int) -> Groups:
    """The launch over a table ``[N, C]`` by groups."""
    slots = power_of_two(per_group)
    together = min(power_of_two(num_groups), max(1024 // slots, 1))
    return Groups(together, slots, 1, 1, 4, samples * cdiv(num_groups, together))
