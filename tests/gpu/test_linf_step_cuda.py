"""linf_step on CUDA tensors, bit for bit as the reference computes it."""

import pytest
import torch
from accuracy import DTYPES, SHAPES, generator, lay_out

from ssp_fused import _extension, reference

OP = torch.ops.ssp_fused.linf_step
STEP = (0.1, 0.3, -0.5, 1.0)
LAYOUTS = ("planes", "rows", "slice")


def missing():
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return _extension.load("cuda")


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def operands(shape, dtype, layouts=("planes",) * 3, seed=0):
    g = generator(seed, *shape)
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in layouts]
    drawn[1].flatten()[::3] = 0
    return [lay_out(t.cuda(), layout) for t, layout in zip(drawn, layouts, strict=True)]


def agree(tensors, step=STEP):
    before = [t.clone() for t in tensors]
    result, expected = OP(*tensors, *step), reference.linf_step(*tensors, *step)
    assert result.dtype == expected.dtype
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 24, 61, 59), (7,), ()], ids=str)
def test_matches_reference(shape, layout, dtype):
    agree(operands(shape, dtype, (layout,) * 3))


@pytest.mark.parametrize("layouts", [("rows", "planes", "slice"), ("slice", "rows", "planes")])
def test_layouts_may_differ(layouts):
    agree(operands((2, 5, 6, 7), torch.float32, layouts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_unaligned_operands(offset, dtype):
    for position in range(3):
        tensors = operands((1001,), dtype)
        buffer = tensors[position].new_empty(1001 + offset)
        tensors[position] = buffer[offset:].copy_(tensors[position])
        agree(tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.25, -2.0])
    grid = torch.cartesian_prod(values, values, values).to("cuda", dtype)
    agree([grid[:, k].contiguous() for k in range(3)])


def test_runs_are_bitwise_equal():
    tensors = operands((8, 64, 33, 31), torch.bfloat16)
    first = OP(*tensors, *STEP)
    assert all(torch.equal(first, OP(*tensors, *STEP)) for _ in range(100))


def test_runs_on_the_current_stream():
    # A kernel on any other stream would read the operands before they are written.
    expected = reference.linf_step(*operands((64, 64, 64, 64), torch.float32), *STEP)
    tensors = [torch.zeros_like(expected) for _ in range(3)]
    sources = operands((64, 64, 64, 64), torch.float32)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for tensor, source in zip(tensors, sources, strict=True):
            tensor.copy_(source)
        result = OP(*tensors, *STEP)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_graph_capture():
    tensors = operands((2, 16, 9, 9), torch.float16)
    OP(*tensors, *STEP)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = OP(*tensors, *STEP)
    for tensor, fresh in zip(tensors, operands((2, 16, 9, 9), torch.float16, seed=1), strict=True):
        tensor.copy_(fresh)
    graph.replay()
    assert torch.equal(result, reference.linf_step(*tensors, *STEP))


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    tensors = [t.to("cuda:1") for t in operands((5, 7), torch.float32)]
    agree(tensors)
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("needs 26 GB of free GPU memory")
    x_adv, grad, x = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    x_adv[-7:], grad[-7:], x[-7:] = 0.5, -1, 0.25
    tail = [t[-7:].clone() for t in (x_adv, grad, x)]
    result = OP(x_adv, grad, x, *STEP)
    assert torch.equal(result[-7:], reference.linf_step(*tail, *STEP))
    assert not result[:-7].any()


def test_opcheck():
    for layout in LAYOUTS:
        tensors = operands((2, 3, 4, 5), torch.float32, (layout,) * 3)
        results = torch.library.opcheck(OP.default, (*tensors, *STEP))
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, g, x: (a, g[:1], x), r"grad must have the shape \[2, 3\], but has \[1, 3\]"),
        (lambda a, g, x: (a, g, x.half()), "x must have x_adv's dtype Float, but has Half"),
        (lambda a, g, x: (a, g.cpu(), x), "grad must be on cuda:0 like the first operand"),
        (lambda a, g, x: (a.cpu(), g, x), "x_adv must be on a CUDA device"),
        (lambda a, g, x: (a.int(), g.int(), x.int()), "x_adv must be float32, float64, float16"),
    ],
)
def test_bad_operands(spoil, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*spoil(*operands((2, 3), torch.float32)), *STEP)
