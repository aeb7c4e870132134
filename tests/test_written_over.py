"""The CPU's ops that write over tensors of the caller's: the bits of those that make new ones, nothing else touched."""

import itertools

import pytest
import torch
from accuracy import DTYPES, LARGE_SHAPE, cases, lay_out
from chains import make, needs_cpu_backend, randomize
from op_judge import Inputs, each_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from ssp_fused import _ops, reference
from ssp_fused._layout import empty, is_rows, mask_shape
from ssp_fused.nn import SSPStack
from ssp_fused.schemes import ShuOsher

pytestmark = needs_cpu_backend
OPS = torch.ops.ssp_fused
RELU = _ops.ACTIVATIONS.index("relu")
SHAPES = ((2, 5, 4, 3), (3, 16, 6, 6), LARGE_SHAPE)
every_form = pytest.mark.parametrize(
    ("layout", "dtype", "shape"), cases(("planes", "rows"), DTYPES, SHAPES), ids=str
)


def copies(value):
    """The same arguments; a tensor that occurs twice is one tensor still."""
    found = {}

    def copy(tensor):
        return found.setdefault(id(tensor), tensor.clone())

    return each_tensor(copy, value)


def result(like):
    return empty(like, is_rows(like), like.dtype).fill_(torch.nan)


@every_form
def test_stage_norm_act(layout, dtype, shape):
    drawn = Inputs(0, shape, dtype, layout, terms=3)
    arguments = (*drawn.stage, *drawn.norm, RELU)
    expected = OPS.stage_norm_act(*arguments, None, True, True)
    for over_u, over_z in [(None, None), *itertools.permutations((None, 0, 1, 2), 2)]:
        terms, *rest = copies(arguments)
        u = result(terms[0]) if over_u is None else terms[over_u]
        z = result(terms[0]) if over_z is None else terms[over_z]
        rows = is_rows(terms[0])
        mask = torch.empty(mask_shape(shape, rows), dtype=torch.uint8)
        kept = [t.clone() for k, t in enumerate(terms) if k not in (over_u, over_z)]
        OPS.stage_norm_act.out(terms, *rest, u=u, z=z, mask=mask)
        torch.testing.assert_close((u, z, mask), expected, rtol=0, atol=0)
        left = [t for k, t in enumerate(terms) if k not in (over_u, over_z)]
        torch.testing.assert_close(left, kept, rtol=0, atol=0)
        OPS.stage_norm_act.out(*copies(arguments), u=None, z=z.fill_(torch.nan), mask=None)
        assert torch.equal(z, expected[1])


@pytest.mark.parametrize("by_mask", [False, True], ids=["u", "mask"])
@every_form
def test_norm_act_backward(layout, dtype, shape, by_mask):
    i = Inputs(0, shape, dtype, layout)
    extras = (i.extras, [0.5, 1.0], None)
    if by_mask:
        given = (None, reference.pack_mask(i.u > 0, is_rows(i.u)), None)
    else:
        given = (i.u, None, i.mean)
    norm = (i.rstd, *i.affine, RELU, None, None, 1.0, None)
    arguments = (i.dz, 0.25, None, *given, *norm, *extras)
    expected = OPS.norm_act_backward(*arguments, None)
    for over in (None, "dz", "extra", *([] if by_mask else ["u"])):
        dz, scale, tensor, u, *rest = copies(arguments)
        du = {None: result(i.dz), "dz": dz, "u": u, "extra": rest[-3][1]}[over]
        OPS.norm_act_backward.out(dz, scale, tensor, u, *rest, du=du)
        assert torch.equal(du, expected), over


@every_form
def test_batch_norm_act_backward(layout, dtype, shape):
    i = Inputs(0, shape, dtype, layout)
    arguments = (i.dz, 0.25, None, i.u, *i.norm, RELU, i.extras, [0.5, 1.0], None)
    expected = OPS.batch_norm_act_backward(*arguments, True)
    for over, write_z in itertools.product((None, "dz", "u", "extra"), (True, False)):
        dz, scale, tensor, u, *rest = copies(arguments)
        du = {None: result(i.dz), "dz": dz, "u": u, "extra": rest[5][0]}[over]
        z = result(i.dz) if write_z else None
        sums = OPS.batch_norm_act_backward.out(dz, scale, tensor, u, *rest, du=du, z=z)
        found = (du, *sums, z) if write_z else (du, *sums)
        torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=0)


def calls():
    """Arguments of every op, and its result's name."""
    i = Inputs(0, (2, 4, 3, 3), torch.float32, "rows")
    norm, extras = (*i.norm, RELU), (i.extras, [0.5, 1.0], None)
    sums = (None, None, 1.0, None)
    mask = torch.empty(mask_shape(i.u.shape, True), dtype=torch.uint8)
    return {
        "stage_norm_act.out": ((*i.stage, *norm), {"u": result(i.u), "mask": mask}, "z"),
        "norm_act_backward.out": ((i.dz, 1.0, None, i.u, None, *norm, *sums, *extras), {}, "du"),
        "batch_norm_act_backward.out": (
            (i.dz, 1.0, None, i.u, *norm, *extras),
            {"z": result(i.u)},
            "du",
        ),
    }


@pytest.mark.parametrize("name", _ops.OUT_SCHEMAS)
def test_opcheck(name):
    arguments, others, written = calls()[name]
    op = getattr(OPS, name.removesuffix(".out")).out
    keywords = others | {written: result(arguments[0] if name[0] != "s" else arguments[0][0])}
    results = torch.library.opcheck(op, arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}, results


BAD = {
    "shape": (lambda t: t[:1], "must have the shape"),
    "dtype": (lambda t: t.double(), "must"),
    "layout": (lambda t: t.contiguous(), r"must be dense in rows \(channels last\)"),
    "gaps": (lambda t: torch.cat([t, t], dim=1)[:, ::2], "must be dense in rows"),
}


@pytest.mark.parametrize("name", _ops.OUT_SCHEMAS)
@pytest.mark.parametrize("fault", BAD)
def test_a_result_that_does_not_fit_is_refused(name, fault):
    arguments, others, written = calls()[name]
    spoil, message = BAD[fault]
    op = getattr(OPS, name.removesuffix(".out")).out
    good = result(arguments[0] if name[0] != "s" else arguments[0][0])
    with pytest.raises(RuntimeError, match=message):
        op(*arguments, **others, **{written: spoil(good)})


def test_two_results_are_two_tensors():
    arguments, others, _ = calls()["stage_norm_act.out"]
    with pytest.raises(RuntimeError, match="u and z must be two tensors"):
        OPS.stage_norm_act.out(*arguments, **others | {"z": others["u"]})
    arguments, others, _ = calls()["batch_norm_act_backward.out"]
    with pytest.raises(RuntimeError, match="du and z must be two tensors"):
        OPS.batch_norm_act_backward.out(*arguments, **others, du=others["z"])


def test_z_that_does_not_fit_is_refused():
    arguments, others, _ = calls()["batch_norm_act_backward.out"]
    for spoil, message in BAD.values():
        with pytest.raises(RuntimeError, match=message):
            OPS.batch_norm_act_backward.out(
                *arguments, du=result(arguments[0]), z=spoil(others["z"])
            )


# u2 = u1 stands for a stage that is read later, and for a block's result.
STILL = ShuOsher("still", ((1,), (0, 1), (0.5, 0, 0.5)), ((1,), (0, 0), (0, 0, 1)))
LAST = ShuOsher("last", ((1,), (0, 1)), ((1,), (0, 0)))
KINDS = (STILL, LAST, "ssp22", "ssp104", "midpoint", "adaptive", "downsample")


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("recording", [True, False], ids=["attack", "inference"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: getattr(k, "name", str(k)))
def test_a_chain_writes_over_nothing_that_is_still_read(kind, recording, layout, monkeypatch):
    """Its input, the gradient of its result, stages that a later one has: all bits are as without."""
    blocks = [make(kind, 8, dtype=torch.float32), make("ssp33", 8, dtype=torch.float32)]
    if kind == "downsample":
        blocks = [make("ssp54", 8, dtype=torch.float32), blocks[0]]
    stack = randomize(SSPStack(*blocks), 0).eval().requires_grad_(False)
    x = lay_out(torch.randn(3, 8, 7, 5), layout).requires_grad_(recording)
    dy = torch.ones_like(stack(x))
    before = x.detach().clone(), dy.clone()

    def run():
        y = stack(x)
        dx = torch.autograd.grad(y, x, dy)[0] if recording else None
        return y.detach(), dx

    with monkeypatch.context() as patch:
        patch.setattr("ssp_fused._backends.cpu.BACKEND.writes_over", False)
        expected = run()
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


def test_a_training_pass_writes_every_z_over_the_last():
    """Of one shape; another shape is a tensor of its own."""
    stack = randomize(make(("ssp22", "ssp33", "downsample", "ssp22"), 8, dtype=torch.float32), 0)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    written = []

    class Witness(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.batch_norm_act_backward.out and kwargs["z"] is not None:
                written.append(kwargs["z"])
            return func(*args, **(kwargs or {}))

    with ssp_fused.use_backend("cpu"):
        y = stack(x)
        with Witness():
            y.sum().backward()
    addresses = {}
    for z in written:
        addresses.setdefault(z.shape, set()).add(z.data_ptr())
    assert len(written) == 2 * (2 + 3 + 1 + 2)
    # x's shape comes before the subsampling block, and in its norm1; the other one behind it.
    assert [len(found) for found in addresses.values()] == [1, 1]
