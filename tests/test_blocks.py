"""Blocks against the same modules run one by one in fp64, by the rule of ``accuracy``; and who did the work."""

import copy

import pytest
import torch
from accuracy import cases, generator
from chains import (
    BLOCKS,
    ODD,
    PLAIN,
    Activation,
    judge,
    make,
    module_by_module,
    needs_cpu_backend,
    randomize,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from ssp_fused import _log, schemes
from ssp_fused.nn import AdaptiveSSPBlock, SSPBlock

pytestmark = needs_cpu_backend


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_scheme_and_norm(kind, norm, training):
    judge(kind, ODD, norm=norm, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", ["ssp33", "adaptive"])
def test_dtypes(kind, norm, dtype, training):
    judge(kind, (3, 6, 5, 4), norm=norm, dtype=dtype, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["rows", "slice"])
@pytest.mark.parametrize("activation", PLAIN)
def test_activations_and_layouts(activation, layout, training):
    for kind, norm in (("ssp22", "batch"), ("downsample", "group")):
        judge(
            kind,
            ODD,
            norm=norm,
            activation=activation,
            layout=layout,
            training=training,
        )


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 7), (1, 3, 6, 6), (2, 17, 4, 3), (2, 65, 3, 3), (8, 4, 1, 1)]
)
def test_odd_shapes(shape):
    judge("ssp22", shape, layout="rows")
    judge("ssp22", shape, norm="group", num_groups=1, layout="rows")
    judge("ssp22", shape, norm="instance", layout="rows")


def test_options():
    judge("ssp22", (2, 6, 5, 4), norm="group", num_groups=1)
    judge("ssp33", (2, 6, 5, 4), bias=False, step_size=0.5)
    judge("ssp33", (2, 6, 5, 4), eps=0.1, momentum=0.3)
    judge("adaptive", (2, 6, 5, 4), bias=False, step_size=0.5)


def test_empty_batch():
    for training in (True, False):
        block = make("ssp33", 4).train(training)
        x = torch.randn(0, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        y = block(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 4, 5, 5)
        assert all(not p.grad.any() for p in block.parameters())
        assert not block.norm1.running_mean.any()


def running_statistics(block, x, steps, forward):
    for step in range(steps):
        forward(x[step])
    return {name: b.clone() for name, b in block.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("kind", BLOCKS)
def test_running_statistics_after_several_steps(kind, momentum):
    """Against torch.nn.BatchNorm2d, which sees every evaluation of F, repeated ones too."""
    block = randomize(make(kind, 4, momentum=momentum), 0)
    twin = copy.deepcopy(block)
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
    act = Activation("relu")
    fused = running_statistics(block, x, 3, block)
    plain = running_statistics(twin, x, 3, lambda x: module_by_module(twin, x, act))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_statistics_that_are_not_tracked():
    block = make("ssp22", 4)
    for norm in ("norm1", "norm2"):
        setattr(block, norm, torch.nn.BatchNorm2d(4, track_running_stats=False).double())
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for mode in (True, False):
        block.train(mode)
        with ssp_fused.use_backend("reference"):
            expected = block(x)
        torch.testing.assert_close(block(x), expected)


def test_each_norms_own_mode_governs_it():
    """A frozen BatchNorm in a training block uses, and keeps, its running statistics."""
    block = randomize(make("ssp33", 4), 0)
    block.norm2.eval()
    before = {n: b.clone() for n, b in block.norm2.named_buffers()}
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with ssp_fused.use_backend("reference"):
        expected = copy.deepcopy(block)(x)
    torch.testing.assert_close(block(x), expected)
    assert all(torch.equal(before[n], b) for n, b in block.norm2.named_buffers())
    assert block.norm1.num_batches_tracked == 3


@pytest.mark.parametrize("kind", ["ssp33", "adaptive", "downsample"])
@pytest.mark.parametrize("modes", cases((True, False), (True, False)), ids=str)
def test_two_forwards_before_one_backward(kind, modes):
    """TRADES: clean and adversarial pass share one backward, in every order of modes.

    Against a backward of its own after each forward: plain batch norm's evaluation-mode backward reads the live
    running statistics, which a forward in training mode has moved by then.
    """

    def gradients(block, at_once):
        x = torch.randn(2, 3, 5, 5, 5, dtype=torch.float64, generator=generator(1))
        x.requires_grad_()
        losses = []
        for k, mode in enumerate(modes):
            losses.append(block.train(mode)(x[k]).pow(2).sum() * (k + 1))
            if not at_once:
                losses.pop().backward()
        if at_once:
            sum(losses).backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    block = randomize(make(kind), 0)
    twin = copy.deepcopy(block)
    fused = gradients(block, at_once=True)
    with ssp_fused.use_backend("reference"):
        expected = gradients(twin, at_once=False)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_gradcheck(kind, norm):
    block = randomize(make(kind, 2, norm=norm, activation="silu"), 0)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    named = dict(block.named_parameters())
    if "a21" in named:  # its exact zero is tested below
        named.pop("a21")
    names = list(named)
    assert torch.autograd.gradcheck(function, (x, *named.values()), nondet_tol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "norm", "training"),
    [
        *cases(BLOCKS, ["batch"], [True]),
        *cases(["ssp22", "adaptive", "downsample"], ["batch", "group"], [False]),
        *cases(["ssp33", "adaptive", "downsample"], ["group"], [True]),
    ],
    ids=str,
)
def test_gradgradcheck(kind, norm, training):
    block = randomize(make(kind, 2, norm=norm, activation="silu"), 0).train(training)
    # The higher the order of a derivative, the worse finite differences see it: keep the branch tame.
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.mul_(0.3)
    x = torch.randn(3, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, (x,), atol=1e-4)


def test_adaptive_a21_has_a_gradient_of_exactly_zero():
    block = randomize(make("adaptive", 4), 0)
    block(torch.randn(2, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert block.a21.grad is not None and block.a21.grad == 0
    assert block.b10.grad != 0
    frozen = AdaptiveSSPBlock(4, learn_a21=False, learn_b10=False)
    frozen(torch.randn(2, 4, 5, 5)).sum().backward()
    assert frozen.a21.grad is None and frozen.b10.grad is None


def test_exact_zeros_are_tensors():
    """conv1's bias before a training BatchNorm: a gradient of zero, not a missing one."""
    block = make("ssp22", 4)
    block(torch.randn(2, 4, 5, 5, dtype=torch.float64)).pow(2).sum().backward()
    assert block.conv1.bias.grad is not None and not block.conv1.bias.grad.any()


def test_attack_on_a_frozen_block_keeps_no_activation_of_the_norms():
    """What the fused ops save for an input gradient of a frozen eval-mode block: masks and vectors."""
    block = make("ssp33", 16, dtype=torch.float32).eval().requires_grad_(False)
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    saved = []

    class Fused(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("ssp_fused::norm_act_backward"):
                saved.extend(args[3:5])
            return func(*args, **(kwargs or {}))

    y = block(x)
    with Fused():
        torch.autograd.grad(y.sum(), x)
    assert len(saved) == 12
    assert all(u is None for u in saved[::2])
    assert all(mask.dtype == torch.uint8 for mask in saved[1::2])


@pytest.mark.parametrize("where", ["norm1", "conv1", "norm2", "conv2"])
@pytest.mark.parametrize("change", ["hook", "pre-hook", "replaced", "parametrized", "forward"])
def test_submodules_are_not_bypassed(where, change):
    """Hooks run, replacements and parametrizations take effect, and the result is the module-by-module one."""
    block = randomize(make("ssp22", 4), 0)
    module, calls = getattr(block, where), []
    match change:
        case "hook":
            module.register_forward_hook(lambda m, args, out: calls.append(1) or out * 2)
        case "pre-hook":
            module.register_forward_pre_hook(lambda m, args: calls.append(1) or (args[0] * 2,))
        case "forward":
            plain = module.forward
            module.forward = lambda u: calls.append(1) or plain(u) * 2
        case "parametrized":
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Counted(calls))
        case "replaced":
            setattr(block, where, torch.nn.Sequential(module, Scale(calls)))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    twin = copy.deepcopy(block)
    calls.clear()
    y = block(x)
    assert len(calls) == 2
    with ssp_fused.use_backend("reference"):
        torch.testing.assert_close(y, twin(x))


def test_unfused_submodules_are_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    block = make("ssp33", 4)
    block.conv1.register_forward_hook(lambda *_: None)
    for _ in range(2):
        block(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert [r.message for r in caplog.records] == [
        "a Conv2d in a block is called as it is, unfused: it has hooks"
    ]


def test_hooks_on_all_modules_are_not_bypassed():
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        make("euler", 4)(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    finally:
        handle.remove()
    assert called == ["BatchNorm2d", "Conv2d", "BatchNorm2d", "Conv2d", "SSPBlock"]


class Scale(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        self.calls.append(1)
        return x * 2

    def __deepcopy__(self, memo):
        return type(self)(self.calls)


class Counted(Scale):
    """As a parametrization: doubles the weight."""


def test_autocast_and_grad_dtypes():
    block, x = make("ssp33", 8, dtype=torch.float32), torch.randn(2, 8, 6, 6)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        with ssp_fused.use_backend("reference"):
            expected = copy.deepcopy(block)(x)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("kind", ["ssp33", "adaptive", "downsample"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(kind, training):
    """The ops are opaque to a compiler, the Functions around them are not."""
    block = randomize(make(kind, 4), 0).train(training).requires_grad_(training)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y, expected = compiled(x), block(x)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))
    torch.testing.assert_close(
        dict(compiled._orig_mod.named_buffers()), dict(block.named_buffers())
    )


def test_long_rows_of_a_users_scheme():
    """A row with more terms than an op takes is summed up in two."""
    steps = 8
    alpha = tuple(tuple(1 / i for _ in range(i)) for i in range(1, steps + 1))
    scheme = schemes.ShuOsher("long", alpha, alpha)
    block = randomize(SSPBlock(3, scheme, dtype=torch.float64), 0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with ssp_fused.use_backend("reference"):
        expected = copy.deepcopy(block)(x)
    torch.testing.assert_close(block(x), expected)


def test_state_dict_is_torchs_own():
    block = SSPBlock(4)
    assert set(block.state_dict()) == {
        f"{module}.{name}"
        for module, names in {
            "norm1": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
            "conv1": ("weight", "bias"),
            "norm2": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
            "conv2": ("weight", "bias"),
        }.items()
        for name in names
    }
    assert set(AdaptiveSSPBlock(4).state_dict()) == {*block.state_dict(), "a21", "b10"}
