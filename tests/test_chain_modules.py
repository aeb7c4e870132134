"""Stacks of modules in every state that PyTorch lets them be in: results as module by module, nothing bypassed."""

import copy

import pytest
import torch
from accuracy import generator
from chains import (
    assert_same,
    gradients,
    make,
    module_by_module,
    needs_cpu_backend,
    randomize,
    results,
    twins,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ssp_fused
from ssp_fused import schemes
from ssp_fused.nn import AdaptiveSSPBlock, SSPBlock, SSPStack

pytestmark = needs_cpu_backend

KINDS = ("ssp33", "downsample", "adaptive")
SHAPE = (3, 5, 7, 5)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def normal(*shape, seed=1):
    return torch.randn(shape, generator=generator(seed, 9), dtype=torch.float64)


def assert_as_module_by_module(stack, shape=SHAPE, steps=2):
    """Outputs, gradients and buffers of a few forward and backward passes."""
    plain = copy.deepcopy(stack)
    for step in range(steps):
        for module in (stack, plain):
            module.zero_grad()
        values = results(stack, normal(*shape, seed=step), stack)
        expected = results(plain, normal(*shape, seed=step), lambda x: module_by_module(plain, x))
        assert_same(values, expected, f"step {step}", **CLOSE)


def shared_block():
    block = make("ssp22")
    return SSPStack(block, block, make("adaptive"), block)


def norms_shared_between_blocks():
    stack = make(("ssp22", "adaptive", "ssp33"))
    stack[1].norm1 = stack[0].norm1
    stack[2].norm1 = stack[0].norm2
    return stack


def norm_shared_by_a_block():
    stack = make(("ssp22", "ssp33"))
    stack[0].norm2 = stack[0].norm1
    return stack


def norm_shared_by_an_adaptive_block():
    stack = make(("ssp22", "adaptive"))
    stack[1].norm2 = stack[1].norm1
    return stack


def norm_shared_by_a_branch_and_a_shortcut():
    stack = make(("downsample", "ssp22"))
    stack[0].downsample[1] = stack[0].norm2
    return stack


def shared_convolutions():
    stack = make(("ssp22", "ssp33"))
    stack[1].conv1 = stack[1].conv2 = stack[0].conv1
    return stack


def norm_in_two_resolutions():
    stack = SSPStack(make("ssp22"), ssp_fused.nn.PreActDownsample(5, 5).double(), make("ssp22"))
    stack[2].norm1 = stack[0].norm1
    return stack


def untracked():
    stack = make(KINDS)
    stack[0].norm2 = nn.BatchNorm2d(5, track_running_stats=False).double()
    stack[2].norm1 = nn.BatchNorm2d(6, track_running_stats=False).double()
    return stack


def tracking_switched_off():
    stack = make(KINDS)
    stack[0].norm1.track_running_stats = False
    return stack


def without_affine():
    stack = make(KINDS)
    stack[0].norm1 = nn.BatchNorm2d(5, affine=False).double()
    stack[1].downsample[1] = nn.BatchNorm2d(6, affine=False).double()
    stack[2].norm2 = nn.GroupNorm(3, 6, affine=False).double()
    return stack


def mixed_norms():
    stack = make(KINDS)
    stack[0].norm2 = nn.GroupNorm(5, 5).double()
    stack[2].norm1 = nn.GroupNorm(2, 6).double()
    return stack


def without_momentum():
    return make(KINDS, momentum=None)


def without_bias():
    return make(KINDS, bias=False)


def step_sizes():
    return SSPStack(make("ssp33", step_size=0.5), make("adaptive", step_size=0.3), make("ssp54"))


def mixed_activations():
    names = ("leaky_relu", "silu", "identity", "relu")
    return SSPStack(*(make("ssp22", activation=name) for name in names))


def biased_shortcut():
    stack = make(("downsample", "downsample"))
    stack[1].downsample[0] = nn.Conv2d(6, 7, 1, stride=2, bias=True).double()
    return stack


def long_rows():
    alpha = tuple(tuple(1 / i for _ in range(i)) for i in range(1, 8))
    scheme = schemes.ShuOsher("long", alpha, alpha)
    return SSPStack(make("ssp22"), SSPBlock(5, scheme, dtype=torch.float64), make("ssp22"))


def idle_stages():
    """Rows that use no F, a stage that no row uses, an F that none does."""
    alpha = ((1,), (0, 1), (1, 0, 0), (0, 0.5, 0.5, 0))
    beta = ((1,), (0, 0), (0.5, 0, 0), (0, 0.25, 0.5, 0))
    scheme = schemes.ShuOsher("idle", alpha, beta)
    return SSPStack(make("ssp22"), SSPBlock(5, scheme, dtype=torch.float64), make("ssp22"))


def geometry():
    """Convolutions of the same type and another geometry: wider, dilated, grouped, without padding."""
    stack = make(("ssp22", "ssp22", "ssp22"))
    stack[0].conv1 = nn.Conv2d(5, 5, 3, padding=2, dilation=2).double()
    stack[0].conv2 = nn.Conv2d(5, 5, 1, bias=False).double()
    stack[1].conv1 = nn.Conv2d(5, 5, 3, padding=1, groups=5).double()
    stack[2].conv1 = nn.Conv2d(5, 5, 3).double()
    stack[2].conv2 = nn.Conv2d(5, 5, (3, 3), padding=(2, 2)).double()
    return stack


def wider_inside():
    stack = make(("ssp22", "ssp22"))
    for block in stack:
        block.conv1 = nn.Conv2d(5, 8, 3, padding=1).double()
        block.norm2 = nn.BatchNorm2d(8).double()
        block.conv2 = nn.Conv2d(8, 5, 3, padding=1).double()
    return stack


def padding_by_name():
    stack = make(("ssp22", "ssp22"))
    stack[0].conv1 = nn.Conv2d(5, 5, 1, padding="valid").double()
    stack[1].conv1 = nn.Conv2d(5, 5, 3, padding="same").double()
    return stack


def reflecting():
    stack = make(("ssp22", "ssp22"))
    stack[1].conv2 = nn.Conv2d(5, 5, 3, padding=1, padding_mode="reflect").double()
    return stack


STACKS = [
    shared_block,
    norms_shared_between_blocks,
    norm_shared_by_a_block,
    norm_shared_by_an_adaptive_block,
    norm_shared_by_a_branch_and_a_shortcut,
    shared_convolutions,
    norm_in_two_resolutions,
    untracked,
    tracking_switched_off,
    without_affine,
    mixed_norms,
    without_momentum,
    without_bias,
    step_sizes,
    mixed_activations,
    biased_shortcut,
    long_rows,
    idle_stages,
    geometry,
    wider_inside,
    padding_by_name,
    reflecting,
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", STACKS, ids=lambda build: build.__name__)
def test_as_module_by_module(build, training):
    assert_as_module_by_module(randomize(build(), 0, scale=0.1).train(training))


def test_each_norms_own_mode_governs_it():
    """Batch norms frozen one at a time in a training chain, and the other way round."""
    for training in (True, False):
        for number in range(7):
            stack = randomize(make(KINDS), 0, scale=0.1).train(training)
            norms = [m for m in stack.modules() if isinstance(m, nn.BatchNorm2d)]
            assert len(norms) == 7
            norms[number].train(not training)
            assert_as_module_by_module(stack, steps=1)


@pytest.mark.parametrize("learned", [(True, False), (False, True), (False, False)], ids=str)
def test_learned_coefficients_may_be_frozen(learned):
    a21, b10 = learned
    block = AdaptiveSSPBlock(5, learn_a21=a21, learn_b10=b10, b10=-0.4, dtype=torch.float64)
    stack = randomize(SSPStack(make("ssp22"), block, make("ssp22")), 0)
    assert_as_module_by_module(stack)
    assert (block.a21.grad is not None, block.b10.grad is not None) == learned


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


class Doubled(SSPBlock):
    """A user's own block."""

    def forward(self, x):
        return super().forward(x) * 2


def count_calls(module, calls, kind):
    def note(*_):
        calls.append(1)

    match kind:
        case "forward hook":
            module.register_forward_hook(lambda m, args, out: note() or out * 2)
        case "forward pre-hook":
            module.register_forward_pre_hook(lambda m, args: note() or (args[0] * 2,))
        case "backward hook":
            module.register_full_backward_hook(note)
        case "backward pre-hook":
            module.register_full_backward_pre_hook(note)
        case "forward":
            plain = module.forward
            module.forward = lambda x: note() or plain(x) * 2


@pytest.mark.parametrize(
    "kind", ["forward hook", "forward pre-hook", "backward hook", "backward pre-hook", "forward"]
)
@pytest.mark.parametrize("where", ["1", "1.norm2", "1.downsample", "1.downsample.1", "0.conv1"])
def test_hooks_inside_a_stack(where, kind):
    fused, plain = twins(KINDS)
    calls = {fused: [], plain: []}
    for stack in (fused, plain):
        count_calls(stack.get_submodule(where), calls[stack], kind)
    values = gradients(fused, normal(*SHAPE))
    with ssp_fused.use_backend("reference"):
        expected = gradients(plain, normal(*SHAPE))
    assert calls[fused] == calls[plain] != []
    assert_same(values, expected, **CLOSE)
    assert_same(dict(fused.named_buffers()), dict(plain.named_buffers()), **CLOSE)


@pytest.mark.parametrize(
    "foreign",
    [nn.Identity, Twice, lambda: nn.Dropout(0.5), lambda: nn.Conv2d(5, 5, 1).double()],
    ids=["Identity", "Twice", "Dropout", "Conv2d"],
)
def test_foreign_modules_between_blocks(foreign):
    fused = randomize(SSPStack(make("ssp22"), foreign(), make("ssp33"), make("ssp22")), 0, 0.1)
    plain = copy.deepcopy(fused)
    torch.manual_seed(0)
    values = gradients(fused, normal(*SHAPE))
    torch.manual_seed(0)
    expected = gradients(plain, normal(*SHAPE), lambda x: module_by_module(plain, x))
    assert_same(values, expected, **CLOSE)


def test_a_subclass_of_a_block():
    """Its own forward is called, in a stack as by itself."""
    stack = randomize(SSPStack(make("ssp33"), Doubled(5, "ssp22", dtype=torch.float64)), 0)
    with ssp_fused.use_backend("reference"):
        expected = gradients(copy.deepcopy(stack), normal(*SHAPE))
    assert_same(gradients(stack, normal(*SHAPE)), expected, **CLOSE)


@pytest.mark.parametrize("where", ["0.conv1", "1.conv2", "1.downsample.0"])
def test_parametrized_weights(where):
    fused = randomize(make(KINDS), 0)
    parametrizations.weight_norm(fused.get_submodule(where))
    plain = copy.deepcopy(fused)
    values = gradients(fused, normal(*SHAPE))
    expected = gradients(plain, normal(*SHAPE), lambda x: module_by_module(plain, x))
    assert_same(values, expected, **CLOSE)
    assert parametrize.is_parametrized(fused.get_submodule(where))


def test_a_replaced_convolution_is_called():
    fused = randomize(make(KINDS), 0)
    fused[2].conv1 = nn.Sequential(fused[2].conv1, Twice())
    assert_as_module_by_module(fused)


def test_global_hooks_see_every_module():
    stack = make(("euler", "downsample"))
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        stack(normal(*SHAPE))
    finally:
        handle.remove()
    branch = ["BatchNorm2d", "Conv2d", "BatchNorm2d", "Conv2d"]
    assert called[:5] == [*branch, "SSPBlock"]
    assert sorted(called[5:-2]) == sorted(
        [*branch, "BatchNorm2d", "Conv2d", "BatchNorm2d", "Sequential"]
    )
    assert called[-2:] == ["PreActDownsample", "SSPStack"]


def unchanged(stack):
    return copy.deepcopy(dict(stack.named_buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(training):
    stack, plain = twins(KINDS, training=training)
    values = results(stack, torch.zeros(0, 5, 7, 5, dtype=torch.float64), stack)
    assert values["y"].shape == (0, 6, 4, 3) and values["dx"].shape == (0, 5, 7, 5)
    gradients_of_parameters = [v for name, v in values.items() if name.startswith("d ")]
    assert all(gradient is not None and not gradient.any() for gradient in gradients_of_parameters)
    for block in plain:
        block(torch.zeros(0, block.conv1.in_channels, 7, 5, dtype=torch.float64))
    assert_same(dict(stack.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize(
    ("build", "x", "error", "message"),
    [
        (
            lambda: make(("ssp22", "downsample", "ssp22")),
            torch.zeros(1, 5, 2, 2, dtype=torch.float64),
            ValueError,
            r"more than 1 value per channel when training, got input size \(1, 6, 1, 1\)",
        ),
        (
            lambda: SSPStack(make("ssp22", 5), make("ssp22", 6)),
            torch.zeros(2, 5, 4, 4, dtype=torch.float64),
            ValueError,
            r"x must have 6 channels.* got shape \(2, 5, 4, 4\)",
        ),
        (
            lambda: make(KINDS),
            torch.zeros(2, 5, 4, 4, dtype=torch.int64),
            TypeError,
            "must be float32, float64, float16 or bfloat16, got torch.int64",
        ),
        (
            lambda: make(KINDS),
            torch.zeros(2, 5, 4, 4, dtype=torch.complex64),
            TypeError,
            "must be float32, float64, float16 or bfloat16, got torch.complex64",
        ),
        (
            lambda: make(KINDS),
            torch.zeros(2, 5, 4, 4, dtype=torch.float32),
            (TypeError, RuntimeError),
            "(?i)float64|double",
        ),
        (
            lambda: make(KINDS, dtype=torch.float32),
            torch.zeros(2, 5, 4, 4, dtype=torch.bfloat16),
            (TypeError, RuntimeError),
            "(?i)bfloat16",
        ),
    ],
    ids=["one-value", "channels", "integers", "complex", "float64-weights", "float32-weights"],
)
def test_bad_input_writes_nothing(build, x, error, message):
    stack = randomize(build(), 0)
    before = unchanged(stack)
    with pytest.raises(error, match=message):
        stack(x)
    assert_same(dict(stack.named_buffers()), before)


def test_a_stack_without_blocks_is_the_identity():
    x = normal(*SHAPE)
    assert SSPStack()(x) is x
