"""The launch table of the Triton kernels: every element is some program's, and what is chosen is what a GPU can run."""

import math

import pytest
import torch
from accuracy import LARGE_SHAPE, SHAPES, cases

from ssp_fused._triton import launch

H200 = launch.Device(multiprocessors=132)
SMALL = launch.Device(multiprocessors=1)
PROBLEMS = [
    *(shape for shape in SHAPES if math.prod(shape)),
    LARGE_SHAPE,
    (128, 16, 32, 32),
    (128, 640, 8, 8),
    (1024, 64, 256, 257),
]
over_problems = pytest.mark.parametrize(
    ("shape", "rows"), cases(PROBLEMS, (False, True)), ids=lambda v: str(v)
)


def is_power_of_two(size):
    return size > 0 and size & (size - 1) == 0


def assert_tile(tile, matrix, itemsize):
    assert is_power_of_two(tile.lines) and is_power_of_two(tile.length)
    assert matrix.length % tile.unit == 0 and tile.unit * itemsize <= 16
    assert 1 <= tile.warps <= 32 and is_power_of_two(tile.warps)


def elements(matrix):
    return matrix.samples * matrix.lines * matrix.length


@over_problems
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_matrix_of_a_pointwise_op_holds_the_tensor(shape, rows, bits, per_sample):
    matrix = launch.pointwise_matrix(shape, rows, per_sample=per_sample, bits=bits)
    assert elements(matrix) == math.prod(shape)
    assert matrix.channels == shape[1]
    assert (matrix.length if matrix.rows else matrix.lines) % shape[1] == 0
    assert matrix.samples == (shape[0] if per_sample and matrix.rows else 1)
    if bits:  # a byte of the mask belongs to one plane or row
        assert matrix.rows == rows


@over_problems
@pytest.mark.parametrize("operands", [1, 2, 3, 6])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_pointwise_tiles_cover_the_matrix(shape, rows, operands, itemsize):
    matrix = launch.pointwise_matrix(shape, rows)
    for device in (SMALL, H200):
        chosen = launch.pointwise(matrix, operands, itemsize, itemsize, device)
        assert_tile(chosen.tile, matrix, itemsize)
        across = math.ceil(matrix.length / chosen.tile.length)
        down = math.ceil(matrix.lines / chosen.tile.lines)
        assert chosen.programs == matrix.samples * across * down
        assert chosen.programs < 2**31
        if chosen.tile.unit * itemsize == 16:  # 16 warps share a multiprocessor's registers
            assert 16 * 32 * chosen.registers <= 65536
        else:
            assert chosen.registers == launch.registers(chosen.tile.warps)


def test_no_choice_is_made_twice():
    choices = [
        launch.sweep(launch.sweep_matrix(torch.Size([2, 16, 8, 8]), True), 2, 2, 4, H200)
        for _ in range(2)
    ]
    assert choices[0] is choices[1]
    assert launch.sweep(launch.sweep_matrix((2, 16, 8, 8), True), 2, 2, 4, SMALL) != choices[0]


def test_lines_without_channels_stay_short_of_what_kernels_count():
    for shape in ((1, 8), (3, 5, 7), (9, 16, 3904, 3904)):
        matrix = launch.flat_matrix(shape)
        assert elements(matrix) == math.prod(shape)
        assert matrix.length < 2**31


@over_problems
def test_a_large_tensor_keeps_every_multiprocessor_busy(shape, rows):
    matrix = launch.pointwise_matrix(shape, rows)
    chosen = launch.pointwise(matrix, 1, 4, 4, H200)
    if elements(matrix) >= 2**21:
        assert chosen.programs >= 2 * H200.multiprocessors


@over_problems
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("operands", [1, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_sweep_reaches_every_step_once(shape, rows, per_sample, operands, itemsize):
    matrix = launch.sweep_matrix(shape, rows, per_sample=per_sample)
    assert elements(matrix) * matrix.batch == math.prod(shape)
    for device in (SMALL, H200):
        chosen = launch.sweep(matrix, operands, itemsize, itemsize, device)
        assert_tile(chosen.tile, matrix, itemsize)
        columns = math.ceil(matrix.length / chosen.tile.length)
        blocks = math.ceil(matrix.lines / chosen.tile.lines)
        steps = blocks if matrix.rows else matrix.batch
        tiles = columns if matrix.rows else columns * blocks
        assert 1 <= chosen.splits <= steps
        assert chosen.programs == matrix.samples * tiles * chosen.splits
        assert chosen.slots == (chosen.splits if matrix.rows else chosen.splits * columns)
        visited = sorted(
            s for first in range(chosen.splits) for s in range(first, steps, chosen.splits)
        )
        assert visited == list(range(steps))


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 640, 4096])
@pytest.mark.parametrize("parts", [1, 5, 1000])
@pytest.mark.parametrize("tables", [1, 128])
def test_a_merge_covers_the_channels(tables, parts, channels):
    for device in (SMALL, H200):
        chosen = launch.merge(tables, parts, channels, device)
        assert is_power_of_two(chosen.parts) and is_power_of_two(chosen.width)
        assert chosen.parts * chosen.width <= 8192
        assert is_power_of_two(chosen.warps) and chosen.warps <= 8
        assert chosen.programs == tables * math.ceil(channels / chosen.width)


@over_problems
@pytest.mark.parametrize("itemsize", [2, 4])
def test_groups_that_stay_on_chip_fit_there(shape, rows, itemsize):
    matrix = launch.sweep_matrix(shape, rows, per_sample=True)
    c = shape[1]
    for groups in (g for g in range(1, c + 1) if c % g == 0):
        chosen = launch.groups(matrix, groups, itemsize, 16384)
        if chosen is None:
            continue
        sizes = (chosen.groups, chosen.slots, chosen.places, chosen.warps)
        assert all(map(is_power_of_two, sizes)) and chosen.warps <= 16
        assert chosen.slots >= c // groups
        assert chosen.places >= math.prod(shape[2:])
        assert math.prod(sizes[:3]) <= 16384
        assert chosen.programs == shape[0] * math.ceil(groups / chosen.groups)
        gaps = matrix.rows and chosen.slots != c // groups
        narrow = gaps or chosen.unit == 1  # an address for each element: few of them a thread
        assert (
            math.prod(sizes[:3]) <= 32 * chosen.warps * (8 if narrow else 16) or chosen.warps == 16
        )


def test_a_group_past_the_capacity_is_not_kept_on_chip():
    matrix = launch.sweep_matrix((2, 8, 64, 64), False, per_sample=True)
    assert launch.groups(matrix, 2, 4, 16384) is not None
    assert launch.groups(matrix, 1, 4, 16384) is None


@pytest.mark.parametrize(
    ("length", "itemsize", "unit"), [(64, 4, 4), (64, 2, 8), (6, 4, 2), (49, 2, 1), (4, 2, 4)]
)
def test_units_are_what_16_bytes_hold(length, itemsize, unit):
    assert launch.unit(length, itemsize) == unit


@pytest.mark.parametrize(("size", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(size, power):
    assert launch.power_of_two(size) == power
