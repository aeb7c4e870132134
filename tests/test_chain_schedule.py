"""What a chain of blocks runs and what it keeps: every op that touches an activation, every byte between passes."""

import collections

import pytest
import torch
from accuracy import generator
from chains import assert_same, cotangent, make, needs_cpu_backend, randomize
from schedules import Layouts, Schedule

import ssp_fused
from ssp_fused import _chain
from ssp_fused._chain import cache
from ssp_fused.models import sspnet_cifar

pytestmark = needs_cpu_backend

SHAPE = (8, 5, 9, 7)  # more elements than a weight has, also behind a subsampling block


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def run(kinds, mode, **options):
    """The schedules of a forward and of a backward pass; ``mode``: train, eval or frozen."""
    stack = randomize(make(kinds, SHAPE[1], dtype=torch.float32, **options), 0)
    stack.train(mode == "train").requires_grad_(mode != "frozen")
    x = torch.randn(SHAPE, generator=generator(0)).requires_grad_()
    smallest = stack(x).numel()
    assert smallest > max(p.numel() for p in stack.parameters())
    with Schedule(smallest) as forward:
        y = stack(x)
    dy = cotangent(y)
    wanted = [p for p in (x, *stack.parameters()) if p.requires_grad]
    with Schedule(smallest) as backward:
        torch.autograd.grad(y, wanted, dy)
    return forward, backward


def counted(schedule):
    return {op: n for op, n in schedule.count.items() if not op.startswith(("convol", "update"))}


THREE = ("ssp33",) * 3
EVALUATIONS = {"ssp22": 2, "ssp33": 3, "ssp43": 4, "midpoint": 2, "ssp54": 5, "ssp104": 10}
EVALUATIONS |= {"adaptive": 2, "downsample": 1}
# Chains, and how often the backward pass adds up gradients that meet: of an F that two stages use.
CHAINS = [
    (THREE, 0),
    (("ssp22",) * 3, 0),
    (("ssp43",) * 3, 0),
    (("midpoint",) * 3, 0),
    (("ssp54",) * 3, 3),
    (("ssp104",) * 3, 3),
    (("adaptive",) * 3, 3),
    (("downsample",), 0),
    (("ssp22", "downsample", "adaptive", "ssp54"), 2),
]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(("kinds", "sums"), CHAINS, ids=str)
def test_every_pass_over_an_activation(kinds, sums, mode, norm):
    """One op for each norm, forward and backward, one for the last stage; convolutions; nothing else."""
    forward, backward = run(kinds, mode, norm=norm)
    norms = sum(2 * EVALUATIONS[kind] + (kind == "downsample") for kind in kinds)
    convolutions = sum(2 * EVALUATIONS[kind] + (kind == "downsample") for kind in kinds)
    op = {"train": "stage_batch_norm_act"}.get(mode, "stage_norm_act")
    op = "stage_group_norm_act" if norm == "group" else op
    assert counted(forward) == {op: norms, "stage_combine": 1}
    assert forward.count["convolution"] == convolutions

    expected = {"stage_combine": sums} if sums else {}
    if norm == "group":
        expected |= {"group_norm_act_backward": norms}
    elif mode == "train":
        expected |= {"batch_norm_act_backward": norms}
    else:
        expected |= {"norm_act_backward": norms}
    if norm == "batch" and mode == "eval":
        expected |= {"norm_act_backward_reduce": norms}
    if mode != "frozen":
        expected |= {"channel_sum": 1}
        if "adaptive" in kinds:
            expected |= {"stage_dots": 2 * kinds.count("adaptive")}
    assert counted(backward) == expected
    # The input's gradient and the weight's are apart: z is made in between.
    assert backward.count["convolution_backward"] == convolutions * (1 if mode == "frozen" else 2)
    assert forward.others == []
    # A shortcut's gradient is added to the branch's at the positions alone that its convolution reads.
    assert backward.others == []


def test_three_ssp33_blocks_in_numbers():
    forward, backward = run(THREE, "train")
    assert counted(forward) == {"stage_batch_norm_act": 18, "stage_combine": 1}
    assert counted(backward) == {"batch_norm_act_backward": 18, "channel_sum": 1}
    assert forward.count["update_running_stats_"] == 6
    forward, backward = run(THREE, "frozen")
    assert counted(forward) == {"stage_norm_act": 18, "stage_combine": 1}
    assert counted(backward) == {"norm_act_backward": 18}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("kind", "stages"), [("ssp22", 2), ("ssp33", 3), ("ssp104", 10)])
def test_few_ops_on_parameters(kind, stages, blocks):
    """Vectors are added up all at once, weights one by one: on a GPU each op is a launch, of next to no work."""
    stack = randomize(make((kind,) * blocks, 5, dtype=torch.bfloat16), 0)
    x = torch.randn(SHAPE, generator=generator(0)).bfloat16().requires_grad_()
    with Schedule(1) as forward:
        y = stack(x)
    dy = cotangent(y)
    with Schedule(1) as backward:
        torch.autograd.grad(y, [x, *stack.parameters()], dy)
    assert collections.Counter(forward.others) == {
        "aten::_foreach_mul": blocks,  # conv2's bias for each stage
        "aten::stack": 1,  # statistics
        "aten::add": blocks,  # the mean's bias
    }
    weights = 2 * blocks
    assert collections.Counter(backward.others) == {
        "aten::add_": weights * (stages - 1),
        "aten::mul_": blocks,  # of the last stage's F
        "aten::_foreach_mul": 1,
        "aten::_foreach_add": stages - 1,
        "aten::_foreach_copy_": 1,
        "aten::_foreach_zero_": 1,  # conv1's bias
    }


def test_gradients_are_tensors_of_their_own():
    """Those of conv2's biases are multiples of one sum, by 1 or nearly so."""
    stack = make(("ssp22", "euler", "euler"), dtype=torch.float32)
    x = torch.randn(SHAPE, generator=generator(0))
    y = stack(x)
    gradients = torch.autograd.grad(y, list(stack.parameters()), cotangent(y))
    storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(storages) == len(gradients)


@pytest.mark.parametrize(
    ("channels", "dtype", "rows"),
    [(16, torch.float32, True), (16, torch.float64, False), (12, torch.float32, False)],
)
def test_planes_are_convolved_in_rows_where_onednn_does_that_faster(channels, dtype, rows):
    """Of channels that fill its vectors, in its dtypes; layouts of results and gradients are those of eager."""
    stack = make(("ssp22",) * 2, channels, dtype=dtype)
    x = torch.randn(2, channels, 6, 6, dtype=dtype, requires_grad=True)
    with Layouts() as layouts:
        y = stack(x)
        # Not by backward(), which brings the gradients of parameters into their layouts.
        gradients = torch.autograd.grad(y, [x, *stack.parameters()], cotangent(y))
    assert layouts.seen == {rows}
    for tensor in (y, *gradients):
        assert tensor.is_contiguous()
    with Layouts() as layouts, torch.backends.mkldnn.flags(enabled=False):
        stack(x)
    assert layouts.seen == {False}


@pytest.mark.parametrize("channels", [12, 16])
def test_gradients_have_the_strides_of_their_tensors(channels):
    """Those of 1x1 kernels too, dense in either layout: DistributedDataParallel compares strides."""
    stack = make(("ssp22", "downsample"), channels, dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, channels, 6, 6).to(memory_format=memory_format).requires_grad_()
        y = stack(x)
        # Not by backward(), which brings the gradients of parameters into their layouts.
        tensors = [x, *stack.parameters()]
        gradients = torch.autograd.grad(y, tensors, cotangent(y))
        for tensor, gradient in zip(tensors, gradients, strict=True):
            assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize(("mode", "back"), [("train", 3), ("eval", 3), ("frozen", 2)])
def test_rows_inside_cost_one_copy_each_way(mode, back):
    """x and y; their gradients, and x again where activations are kept."""
    stack = randomize(make(THREE, 16, dtype=torch.float32), 0)
    stack.train(mode == "train").requires_grad_(mode != "frozen")
    x = torch.randn(4, 16, 9, 9, generator=generator(0)).requires_grad_()
    with Schedule(x.numel()) as forward:
        y = stack(x)
    dy = cotangent(y)
    with Schedule(x.numel()) as backward:
        torch.autograd.grad(y, [p for p in (x, *stack.parameters()) if p.requires_grad], dy)
    assert forward.others == ["aten::clone"] * 2
    assert backward.others == ["aten::clone"] * back


@pytest.mark.parametrize("recompute", [True, False])
def test_only_what_is_wanted_is_computed(recompute):
    """No weight's gradient for frozen convolutions; nothing of the blocks before the first that learns."""
    stack = make(THREE, SHAPE[1])
    stack.recompute = recompute
    for module in stack.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.requires_grad_(False)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=generator(0)).requires_grad_()
    y = stack(x)
    with Schedule(1) as schedule:
        y.backward(cotangent(y))
    assert counted(schedule) == {"batch_norm_act_backward": 18}
    assert schedule.count["convolution_backward"] == 18

    stack[2].requires_grad_()
    for block in stack[:2]:
        block.requires_grad_(False)
    y = stack(x.detach())
    with Schedule(1) as schedule:
        y.backward(cotangent(y))
    # The first norm of the block that learns has parameters, and no one before it.
    norms = {"batch_norm_act_backward": 5, "norm_act_backward_reduce": 1}
    assert counted(schedule) == {**norms, "channel_sum": 1}
    assert schedule.count["convolution_backward"] == 12


def kept_bytes(module, x):
    """Of storages saved for backward, without parameters, buffers and the input; each once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def grown_bytes(module, x):
    """Live memory after a forward pass, less that before, without the output."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        y = module(x)
    grown = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return grown - y.untyped_storage().nbytes()


def blocks():
    stack = randomize(make(THREE, 16, dtype=torch.float32), 0, scale=0.1)
    return stack, torch.randn(4, 16, 16, 16, generator=generator(0))


def network():
    return sspnet_cifar("ssp33", 2), torch.rand(4, 3, 32, 32, generator=generator(0))


@pytest.mark.parametrize(
    ("build", "training", "most"),
    [(blocks, True, 0.52), (blocks, False, 0.02), (network, True, 0.55), (network, False, 0.10)],
    ids=["blocks-train", "blocks-frozen", "network-train", "network-frozen"],
)
def test_bytes_kept_for_backward(build, training, most):
    """Training half of eager's; one bit an element for the input gradient of a frozen network."""
    module, x = build()
    module.train(training).requires_grad_(training)
    x.requires_grad_(not training)
    kept = kept_bytes(module, x)
    with ssp_fused.use_backend("reference"):
        eager = kept_bytes(module, x)
    assert kept <= most * eager, kept / eager
    assert grown_bytes(module, x) == pytest.approx(kept, rel=0.02)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    stack, x = blocks()
    with torch.no_grad():
        assert grown_bytes(stack, x.requires_grad_()) == 0
    stack.requires_grad_(False)
    assert grown_bytes(stack, x.detach()) == 0


def test_bytes_kept_by_activation():
    """Of a frozen chain: bits, not even those for the identity, activations where the derivative needs them."""
    kept = {}
    for activation in ("relu", "leaky_relu", "identity", "silu"):
        stack = make(THREE, 16, dtype=torch.float32, activation=activation)
        stack.eval().requires_grad_(False)
        kept[activation] = kept_bytes(stack, blocks()[1].requires_grad_())
    assert kept["identity"] < kept["relu"] == kept["leaky_relu"] < kept["silu"] / 25


def outcome(norm, mode, batch, layout=torch.contiguous_format, dtype=torch.float64, **settings):
    """A stack with these settings: its output, gradients and buffers, and the bytes it keeps."""
    kinds = ("ssp33", "downsample", "adaptive", "ssp22")
    stack = randomize(make(kinds, 5, norm=norm, dtype=dtype), 0)
    stack.train(mode == "train").requires_grad_(mode != "frozen")
    vars(stack).update(settings)
    x = torch.randn((batch, *SHAPE[1:]), dtype=dtype, generator=generator(0))
    x = x.to(memory_format=layout).requires_grad_()
    kept = kept_bytes(stack, x)
    y = stack(x)
    wanted = {name: p for name, p in stack.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [x, *wanted.values()], cotangent(y))
    values = {"y": y.detach()} | dict(zip(["x", *wanted], found, strict=True))
    return values | dict(stack.named_buffers()), kept


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_tiles_of_the_batch_change_no_bit(layout, norm, mode):
    """In fp32: an fp64 convolution of torch's sums in another order for some batch sizes."""
    expected, kept = outcome(norm, mode, 7, layout, torch.float32)
    for tile in (2, 3, 7, 100):
        values, other = outcome(norm, mode, 7, layout, torch.float32, tile=tile)
        assert_same(values, expected, f"tile {tile}:")
        assert other == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("batch", [0, 1])
def test_tiles_of_few_samples(batch):
    for norm in ("batch", "group"):
        values, _ = outcome(norm, "frozen", batch, tile=2)
        assert_same(values, outcome(norm, "frozen", batch)[0])


def test_tiles_go_through_all_blocks_one_after_another():
    stack = make(THREE).eval().requires_grad_(False)
    stack.tile = 2
    with torch.no_grad(), Schedule(1) as schedule:
        stack(torch.randn(6, 5, 4, 4, dtype=torch.float64))
    assert counted(schedule) == {"stage_norm_act": 3 * 18, "stage_combine": 3}


def test_a_tiled_chain_is_differentiable_twice():
    stack = randomize(make(("ssp22", "ssp22"), 2, activation="leaky_relu"), 0).eval()
    stack.requires_grad_(False).tile = 2
    x = torch.randn(5, 2, 3, 2, dtype=torch.float64, generator=generator(0)).requires_grad_()
    (dx,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), x)
    stack.tile = None
    (dx,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(dx.square().sum(), x)[0])


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_blocks_per_node(most, norm, mode):
    """The same function; biases' gradients are summed from the node's own end."""
    values, _ = outcome(norm, mode, 3, blocks_per_node=most)
    expected, _ = outcome(norm, mode, 3)
    biases = {name for name in expected if name.endswith(("conv2.bias", "b10"))}
    for name, value in expected.items():
        close = {"rtol": 1e-9, "atol": 1e-9} if name in biases else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(values[name], value, **close)


def test_blocks_per_node_ends_a_node():
    stack = make(THREE, SHAPE[1])
    stack.blocks_per_node = 2
    with Schedule(1) as schedule:
        stack(torch.randn(SHAPE, dtype=torch.float64))
    assert schedule.count["stage_combine"] == 2


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_without_recomputation(norm, mode):
    """The same bits from more memory."""
    expected, kept = outcome(norm, mode, 8)
    values, more = outcome(norm, mode, 8, recompute=False)
    assert_same(values, expected)
    if mode == "frozen" and norm == "batch":
        assert more == kept
    else:
        assert more > 1.3 * kept


def test_tiles_that_fit_the_cache(monkeypatch):
    stack = make(("ssp22",) * 2, 5).eval().requires_grad_(False)
    x = torch.randn(7, 5, 4, 4, dtype=torch.float64)
    expected = stack(x)
    stack.tile = "cache"
    assert torch.equal(stack(x), expected)  # all of it fits
    monkeypatch.setattr(_chain, "cache_bytes", lambda device: 8 * 2 * x[0].nbytes)
    with Schedule(1) as schedule:
        torch.testing.assert_close(stack(x), expected)
    assert schedule.count["stage_combine"] == 3
    assert cache.cache_bytes(torch.device("cpu")) >= 2**20


@pytest.mark.parametrize("value", [0, -1, 1.5, "lots"])
@pytest.mark.parametrize("name", ["tile", "blocks_per_node"])
def test_counts_that_are_none(name, value):
    stack = make(("ssp22",), 5)
    setattr(stack, name, value)
    with pytest.raises(ValueError, match=f"{name} must be a count of at least 1, or None, got "):
        stack(torch.randn(2, 5, 4, 4, dtype=torch.float64))
