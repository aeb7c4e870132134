"""How the ops run on a device: the same bits every time, in graphs, on any stream and device, past 2^31 elements."""

import math

import pytest
import torch
from accuracy import lay_out
from on_device import NAMESPACES, assert_equal, copied, outcome, usable
from op_judge import Inputs
from op_table import calls

from ssp_fused import _ops, reference

pytestmark = pytest.mark.gpu
IDENTITY, RELU = (_ops.ACTIVATIONS.index(name) for name in ("identity", "relu"))
FORMS = ((torch.float32, "planes"), (torch.bfloat16, "rows"))
SHAPE = (8, 24, 33, 31)

every_call = pytest.mark.parametrize("name", _ops.SCHEMAS)
every_form = pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=lambda v: str(v)[-8:])


@pytest.fixture(params=NAMESPACES)
def implementation(request):
    return usable(request.param)


def placed_calls(implementation, name, dtype, layout, seed=0):
    drawn = calls(Inputs(seed, SHAPE, dtype, layout))[name]
    return getattr(implementation.ops, name), [implementation.place(a) for a in drawn]


@every_form
@every_call
def test_runs_are_bitwise_equal(implementation, name, dtype, layout):
    op, drawn = placed_calls(implementation, name, dtype, layout)
    for arguments in drawn:
        first = outcome(op, copied(arguments))
        for _ in range(200):
            assert_equal(outcome(op, copied(arguments)), first)


@every_form
@pytest.mark.parametrize("name", ["stage_batch_norm_act", "batch_norm_act_backward"])
def test_one_launch_and_two_agree(name, dtype, layout, monkeypatch):
    op, drawn = placed_calls(usable("cuda"), name, dtype, layout)
    for arguments in drawn:
        monkeypatch.setenv("SSP_FUSED_CUDA_SINGLE_LAUNCH", "1")
        single = outcome(op, copied(arguments))
        monkeypatch.setenv("SSP_FUSED_CUDA_SINGLE_LAUNCH", "0")
        torch.testing.assert_close(outcome(op, copied(arguments)), single)


@every_form
@every_call
def test_a_graph_replays_on_changed_inputs(implementation, name, dtype, layout):
    op, drawn = placed_calls(implementation, name, dtype, layout)
    _, fresh = placed_calls(implementation, name, dtype, layout, seed=1)
    for arguments, changed in zip(drawn, fresh, strict=True):
        static = copied(arguments)
        expected = outcome(op, copied(changed))
        outcome(op, copied(arguments))  # what is compiled and looked up once is not captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = outcome(op, static)
        for tensor, value in zip(tensors(static), tensors(changed), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_equal(results, expected)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


@every_form
@every_call
def test_runs_on_the_current_stream(implementation, name, dtype, layout):
    # A kernel on any other stream would read the operands before they are written.
    op, drawn = placed_calls(implementation, name, dtype, layout)
    for arguments in drawn:
        expected = outcome(op, copied(arguments))
        late = copied(arguments)
        for tensor in tensors(late):
            tensor.zero_()
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for tensor, value in zip(tensors(late), tensors(arguments), strict=True):
                tensor.copy_(value)
            results = outcome(op, late)
        stream.synchronize()
        assert_equal(results, expected)


@every_call
def test_second_device(implementation, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    op, drawn = placed_calls(implementation, name, torch.float32, "planes")
    for arguments in drawn:
        there = [on_second_device(a) for a in arguments]
        assert_equal([r.cuda(0) for r in outcome(op, there)], outcome(op, arguments))
    assert torch.cuda.current_device() == 0


def on_second_device(value):
    if isinstance(value, (list, tuple)):
        return type(value)(on_second_device(v) for v in value)
    return value.to("cuda:1") if isinstance(value, torch.Tensor) else value


# --- more than 2^31 elements: the last sample, which lies past them, is as it is alone ---------------------------

LAST = 8
MANY = (LAST + 1, 16, 3904, 3904)


@pytest.fixture(params=["planes", "rows"])
def large(request, implementation):
    """An implementation, its ops, and an activation of zeros but for the last sample's ones and twos."""
    needed = 6 * 2 * math.prod(MANY)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    rows = request.param == "rows"
    order = torch.channels_last if rows else torch.contiguous_format
    value = torch.zeros(MANY, dtype=torch.bfloat16, device="cuda").to(memory_format=order)
    value[LAST] = 1
    value[LAST, :, -1] = 2
    yield implementation.ops, value
    del value
    torch.cuda.empty_cache()


def vectors(*numbers):
    return [torch.full((MANY[1],), float(v), device="cuda") for v in numbers]


def test_large_pointwise_ops(large):
    ops, t = large
    bias, *norm = vectors(0.5, 0.25, 2, 1.5, -0.5)

    def last(op, *arguments):
        whole = outcome(op, arguments)
        alone = outcome(op, [part(a) for a in arguments])
        assert_equal([part(w) for w in whole], alone)

    def part(value):
        if isinstance(value, list):
            return [part(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if value.shape == t.shape:
            return value[LAST:]
        # The mask, whose first dimension is of samples or of rows.
        return value[-(value.shape[0] // MANY[0]) :]

    last(ops.stage_combine, [t, t], [0.5, 1.0], None, None)
    last(ops.stage_norm_act, [t], [0.5], None, bias, *norm, RELU, None, False, True)
    extra = ([t], [1.0], None, None)
    given = (*norm, RELU, None, None, 1.0, None, *extra)
    last(ops.norm_act_backward, t, 0.5, None, t, None, *given)
    last(ops.linf_step, t, t, t, 0.1, 0.3, 0.0, 1.0)
    last(ops.l2_step, t, t, t, 0.1, 0.3, 0.0, 1.0)


def test_large_reductions(large):
    """Sums of ones and twos are exact in whatever order."""
    ops, t = large
    rows = MANY[2] * MANY[3]
    total = torch.full((MANY[1],), float(rows + MANY[3]), device="cuda")
    assert torch.equal(ops.channel_sum(t), total)
    zero, one = vectors(0, 1)
    sums = ops.norm_act_backward_reduce(t, 1.0, None, t, zero, one, one, zero, IDENTITY, False)
    assert torch.equal(sums[0], total)
    squares = torch.full_like(total, float(rows + 3 * MANY[3]))
    assert torch.equal(sums[1], squares)
    torch.testing.assert_close(ops.stage_dots(t, [t]), squares.sum().view(1))
    _, mean, variance = ops.stage_moments([t], [1.0], None, None, False)
    m = rows * MANY[0]
    torch.testing.assert_close(mean.double(), total.double() / m)
    expected = squares.double() / m - (total.double() / m) ** 2
    torch.testing.assert_close(variance.double(), expected)


def test_large_group_norm(large):
    ops, t = large
    norm = (4, *vectors(1.5, -0.5), 1e-5, RELU, None, False)
    z = ops.stage_group_norm_act([t], [1.0], None, None, *norm)[1]
    alone = ops.stage_group_norm_act([t[LAST:]], [1.0], None, None, *norm)[1]
    torch.testing.assert_close(z[LAST:], alone)


# --- linf_step is the reference bit for bit -----------------------------------------------------------------------

STEP = (0.1, 0.3, -0.5, 1.0)


def assert_step(implementation, operands):
    result = implementation.ops.linf_step(*operands, *STEP)
    expected = reference.linf_step(*operands, *STEP)
    assert result.stride() == expected.stride()
    assert_equal([result], [expected])


@pytest.mark.parametrize("layouts", [("rows", "planes", "slice"), ("slice", "rows", "planes")])
def test_linf_step_of_different_layouts(implementation, layouts):
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 5, 6, 7, generator=g) for _ in layouts]
    placed = [lay_out(t.cuda(), layout) for t, layout in zip(drawn, layouts, strict=True)]
    assert_step(implementation, placed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_linf_step_of_unaligned_operands(implementation, offset, dtype):
    for position in range(3):
        operands = [torch.randn(7, 143).to("cuda", dtype) for _ in range(3)]
        buffer = torch.empty(1001 + offset, dtype=dtype, device="cuda")
        operands[position] = buffer[offset:].view(7, 143).copy_(operands[position])
        assert_step(implementation, operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linf_step_of_special_values(implementation, dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.25, -2.0])
    grid = torch.cartesian_prod(values, values, values).to("cuda", dtype)
    assert_step(implementation, [grid[:, k].reshape(7, 49) for k in range(3)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, g, x: (a, g[:1], x), r"grad must .*\[2, 3\].*\[1, 3\]"),
        (lambda a, g, x: (a, g.cpu(), x), "grad must be on .*cuda:0"),
        (lambda a, g, x: (a.int(), g.int(), x.int()), "x_adv must be float32, .*but"),
    ],
)
def test_bad_operands(implementation, spoil, message):
    operands = spoil(*torch.randn(3, 2, 3, device="cuda"))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        implementation.ops.linf_step(*operands, *STEP)
