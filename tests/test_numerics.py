"""What stays true at the edges: NaN and Inf, large means, repeated runs, any number of threads, any instruction set."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import ACTIVATIONS, cases, generator, lay_out

import ssp_fused
from ssp_fused import functional
from ssp_fused.nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock

pytestmark = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)

ACT = {
    "identity": lambda y: y,
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.01),
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_go_through_as_in_eager(activation, value, layout):
    """A diverged run is seen: same non-finite places as eager's, forward and backward."""
    base = torch.randn(2, 5, 4, 4)
    base[0, 1, 2, 3] = value
    base = lay_out(base, layout)
    running = [torch.zeros(5), torch.ones(5)]
    for kind in ("train", "eval", "group", "frozen"):
        outcomes = []
        for fused in (True, False):
            x = base.clone(memory_format=torch.preserve_format).requires_grad_()
            weight = torch.ones(5, requires_grad=kind != "frozen")
            if kind == "group":
                z = (
                    functional.stage_group_norm_act(
                        [x], [1.0], 5, weight, None, activation=activation
                    )[1]
                    if fused
                    else ACT[activation](F.group_norm(x, 5, weight))
                )
            else:
                stats = [r.clone() for r in running]
                training = kind == "train"
                z = (
                    functional.stage_batch_norm_act(
                        [x],
                        [1.0],
                        weight,
                        None,
                        *stats,
                        training=training,
                        activation=activation,
                    )[1]
                    if fused
                    else ACT[activation](F.batch_norm(x, *stats, weight, training=training))
                )
            z.backward(torch.ones_like(z))
            outcomes.append((z.detach(), x.grad))
        for fused, plain in zip(*outcomes, strict=True):
            assert torch.equal(fused.isnan(), plain.isnan()), kind
            assert torch.equal(fused.isinf(), plain.isinf()), kind
            assert torch.equal(fused[plain.isinf()], plain[plain.isinf()]), kind


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_variance_under_a_large_mean(layout):
    """Mean 1e4, deviation 1, fp32: at least three digits of the variance survive, and of z."""
    shape = (16, 6, 33, 31)
    x = torch.randn(shape, generator=generator(0), dtype=torch.float64) + 1e4
    x32 = lay_out(x.float(), layout)
    exact = x32.double()
    _, _, variance = torch.ops.ssp_fused.stage_moments([x32], [1.0], None, None, False)
    true = exact.var(dim=(0, 2, 3), correction=0)
    assert ((variance - true).abs() / true).max() < 1e-4
    _, z, _, _ = torch.ops.ssp_fused.stage_group_norm_act(
        [x32], [1.0], None, None, 3, None, None, 0.0, 0, None, False
    )
    assert (z - F.group_norm(exact, 3, eps=0.0)).abs().max() < 5e-3


def everything(seed, shape, dtype, layout):
    """Outputs and gradients of every block, and of the reductions on their own."""
    tensors = []
    c = shape[1]
    g = generator(seed, *shape)
    for norm in ("batch", "group"):
        for block in (
            SSPBlock(c, "ssp33", norm=norm, activation="silu"),
            AdaptiveSSPBlock(c, norm=norm),
            PreActDownsample(c, c, norm=norm),
        ):
            torch.manual_seed(seed)
            block = block.to(dtype)
            x = torch.randn(shape, generator=g).to(dtype)
            x = lay_out(x, layout).requires_grad_()
            # The convolutions' own weight gradients follow torch; the ops' results are what is promised.
            y = block(x)
            tensors += [y, *torch.autograd.grad(y.square().sum(), [x, *block.norm1.parameters()])]
            tensors += [b for b in block.buffers() if b.is_floating_point()]
    return tensors


def ops_alone(shape, dtype, layout):
    ops = torch.ops.ssp_fused
    g = generator(1, *shape)
    u, dz, e = (lay_out(torch.randn(shape, generator=g).to(dtype), layout) for _ in range(3))
    vectors = [torch.rand(shape[1], generator=g) + 0.5 for _ in range(4)]
    stage = ([u, e], [0.75, 0.25], None, vectors[0])
    out = [*ops.stage_batch_norm_act(*stage, *vectors[:2], 1e-5, 3, None, True)]
    out += ops.stage_group_norm_act(*stage, 1, *vectors[:2], 1e-5, 1, None, True)
    out += ops.stage_norm_act(*stage, *vectors, 1, None, True, True)
    backward = (dz, 1.0, None, u, *vectors, 1, [e], [0.5], None, True)
    out += ops.batch_norm_act_backward(*backward)
    statistics = torch.rand(shape[0], 1, generator=g) + 0.5
    out += ops.group_norm_act_backward(
        dz, 1.0, None, u, None, statistics, statistics, *vectors[2:], 3, [e], [0.5], None, True
    )
    return [*out, ops.channel_sum(u), ops.stage_dots(u, [dz, e]), ops.l2_step(u, dz, e, 1, 2, 0, 1)]


LARGE = (6, 24, 57, 61)


@pytest.mark.parametrize(
    "form", cases([torch.float32, torch.bfloat16], ["planes", "rows"]), ids=str
)
def test_same_bits_for_any_number_of_threads_and_every_run(form):
    dtype, layout = form
    torch.set_num_threads(1)
    expected = ops_alone(LARGE, dtype, layout)
    for threads in (1, 2, 2, 3, 5):
        torch.set_num_threads(threads)
        for k, (value, want) in enumerate(
            zip(ops_alone(LARGE, dtype, layout), expected, strict=True)
        ):
            assert torch.equal(value, want), (threads, k)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_blocks_repeat_bit_for_bit(layout):
    runs = [everything(0, (3, 4, 9, 7), torch.float32, layout) for _ in range(2)]
    assert all(map(torch.equal, *runs))


DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import torch
from test_numerics import ops_alone
from ssp_fused import _extension
assert _extension.load("ops") is None
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for shape in ((3, 5, 7, 9), (2, 16, 33, 31), (4, 65)):
        for layout in ("planes", "rows"):
            for value in ops_alone(shape, dtype, layout):
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(isa):
    environment = {**os.environ, "SSP_FUSED_CPU_ISA": isa}
    script = DIGEST.format(tests=os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


def test_same_bits_on_every_instruction_set():
    """Those that this processor lacks say so."""
    digests = set()
    for isa in ("baseline", "avx2", "avx512"):
        run = digest(isa)
        if run.returncode == 0:
            digests.add(run.stdout)
        else:
            assert "SSP_FUSED_CPU_ISA" in run.stderr and isa in run.stderr
    assert len(digests) == 1


def test_unknown_instruction_set():
    run = digest("sse9")
    assert run.returncode != 0
    assert "sse9" in run.stderr and "baseline" in run.stderr


def test_offsets_beyond_32_bits():
    """The last element of a tensor of more than 2^31 elements is reached."""
    n = (1 << 31) // (1 << 20) + 1
    x = torch.zeros(n, 4, 512, 512, dtype=torch.bfloat16)
    x[-1, -1, -1, -8:] = 3
    u = torch.ops.ssp_fused.channel_sum(x)
    assert u.tolist() == [0, 0, 0, 24]
    del x
