"""The CUDA library's own sources, kernels and host code, on an emulated GPU, held against the reference."""

import dataclasses

import pytest
import torch
from accuracy import LARGE_SHAPE, cases, lay_out
from cuda_on_host import build, emulated
from cuda_on_host.emulated import Gpu, launches_on
from op_judge import Implementation
from op_table import OpTable

RELU = 1
# Rows of 16 channels, enough of them for several blocks, and for more units than registers hold.
SHAPE = (4, 16, 16, 16)
SMALL = Gpu(multiprocessors=1, shared_bytes=16 << 10)
TWO_LAUNCHES = Gpu(cooperative=False)


class OnGpu(OpTable):
    gpu = Gpu()

    @pytest.fixture(autouse=True)
    def _gpu(self, _usable):
        emulated.module().configure(**dataclasses.asdict(self.gpu))
        with emulated.poisoned_memory():
            yield


class TestSingleLaunch(OnGpu):
    implementation = Implementation(emulated.OPS, build.missing, dtypes=emulated.DTYPES)


class TestTwoLaunches(OnGpu):
    """Where more blocks share a tile and no barrier spans the grid; shapes by which the grids differ."""

    implementation = Implementation(
        emulated.OPS,
        build.missing,
        dtypes=emulated.DTYPES,
        shapes=((1, 17, 4, 3), (5, 17), LARGE_SHAPE),
    )
    gpu = Gpu(multiprocessors=40, cooperative=False, order="shuffled", seed=1)


def operands(layout, dtype=torch.float32):
    x, dz = (lay_out(torch.randn(SHAPE).to(dtype), layout) for _ in range(2))
    vector, group = torch.rand(SHAPE[1]) + 0.5, torch.rand(SHAPE[0], 2) + 0.5
    stage = ([x], [0.5], None, vector)
    norm = (vector, vector, vector, vector, RELU)
    extras = ([x], [2.0], None, True)
    return {
        "stage_combine": stage,
        "stage_moments": (*stage, True),
        "stage_norm_act": (*stage, *norm, None, True, True),
        "stage_batch_norm_act": (*stage, vector, vector, 1e-5, RELU, None, True),
        "stage_group_norm_act": (*stage, 2, vector, vector, 1e-5, RELU, None, True),
        "norm_act_backward_reduce": (dz, 1.0, None, x, *norm, True),
        "batch_norm_act_backward": (dz, 1.0, None, x, *norm, *extras),
        "group_norm_act_backward": (dz, 1.0, None, x, vector, group, group, *norm[2:], *extras),
        "channel_sum": (x,),
        "stage_dots": (x, [dz]),
        "linf_step": (x, dz, x, 0.1, 0.3, -0.5, 1.0),
        "l2_step": (x, dz, x, 0.1, 0.3, -0.5, 1.0),
    }


@pytest.fixture(autouse=True)
def _can_be_built():
    if reason := build.missing():
        pytest.skip(reason)
    emulated.module()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", operands("rows"))
def test_the_order_of_blocks_and_threads_changes_no_bit(op, layout, dtype):
    arguments = operands(layout, dtype)[op]
    for gpu in (Gpu(), SMALL, TWO_LAUNCHES):
        first, _ = launches_on(gpu, op, arguments)
        for order, seed in (("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
            ordered = dataclasses.replace(gpu, order=order, seed=seed)
            torch.testing.assert_close(
                launches_on(ordered, op, arguments)[0], first, rtol=0, atol=0
            )


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", ["stage_batch_norm_act", "batch_norm_act_backward"])
def test_one_launch_where_the_tensor_stays_on_chip(op, layout):
    arguments = operands(layout)[op]
    single, launches = launches_on(Gpu(), op, arguments)
    assert len(launches) == 1
    assert launches[0].cooperative == (layout == "rows")
    several, launches = launches_on(TWO_LAUNCHES, op, arguments)
    assert len(launches) == 2
    assert not any(launch.cooperative for launch in launches)
    torch.testing.assert_close(single, several)
    _, launches = launches_on(dataclasses.replace(SMALL, shared_bytes=12 << 10), op, arguments)
    assert len(launches) == (2 if layout == "rows" else 1)


def test_a_cooperative_grid_fits_the_gpu():
    for multiprocessors, blocks in cases((2, 3, 7), (1, 2)):
        gpu = Gpu(multiprocessors, blocks)
        _, launches = launches_on(
            gpu, "stage_batch_norm_act", operands("rows")["stage_batch_norm_act"]
        )
        assert launches[0].blocks <= multiprocessors * blocks


def test_bad_operands_are_refused():
    with pytest.raises(RuntimeError, match="must hold 1 to 6 tensors"):
        emulated.OPS.stage_combine(7 * [torch.zeros(2, 3)], 7 * [1.0], None, None)
    with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16"):
        emulated.OPS.channel_sum(torch.zeros(2, 3, dtype=torch.float64))
