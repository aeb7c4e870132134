"""Gradients of a chain of blocks: which are computed, their derivatives, and edits between the passes."""

import copy
import random

import pytest
import torch
from accuracy import cases, generator
from chains import (
    assert_same,
    cotangent,
    gradients,
    make,
    module_by_module,
    needs_cpu_backend,
    randomize,
    twins,
)

import ssp_fused
from ssp_fused.nn import SSPStack

pytestmark = needs_cpu_backend

KINDS = ("ssp33", "downsample", "adaptive")
SHAPE = (2, 3, 5, 3)
SETTINGS = [("batch", True), ("batch", False), ("group", True)]


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def normal(*shape, seed=1):
    return torch.randn(shape, generator=generator(seed, 8), dtype=torch.float64)


def frozen_except(stack, wanted):
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name in wanted)


def found(stack, x, wanted, *, of_input=True):
    """Gradients by the input and by all parameters, where only some require one."""
    frozen_except(stack, wanted)
    stack.zero_grad()
    x = x.clone().requires_grad_(of_input)
    y = stack(x)
    y.backward(cotangent(y))
    return {"x": x.grad} | {name: p.grad for name, p in stack.named_parameters()}


@pytest.mark.parametrize(("norm", "training"), SETTINGS, ids=str)
@pytest.mark.parametrize("of_input", [True, False], ids=["input", "no-input"])
def test_freezing_changes_no_bit_of_the_others(norm, training, of_input):
    """For every parameter frozen by itself, every one alone left, and random subsets of any size."""
    stack, _ = twins(KINDS, SHAPE[1], norm=norm, training=training)
    x = normal(*SHAPE)
    names = [name for name, _ in stack.named_parameters()]
    everything = found(stack, x, names)
    assert all(gradient is not None for gradient in everything.values())
    draw = random.Random(0)
    subsets = [[n for n in names if n != name] for name in names] + [[name] for name in names]
    subsets += [draw.sample(names, draw.randint(2, len(names) - 2)) for _ in range(20)]
    for wanted in subsets:
        values = found(stack, x, wanted, of_input=of_input)
        expected = {
            name: value if name in wanted or (name == "x" and of_input) else None
            for name, value in everything.items()
        }
        assert_same(values, expected, f"{wanted}:")


@pytest.mark.parametrize(("norm", "training"), SETTINGS, ids=str)
def test_the_inputs_gradient_alone(norm, training):
    stack, _ = twins(KINDS, SHAPE[1], norm=norm, training=training)
    x = normal(*SHAPE)
    everything = found(stack, x, dict(stack.named_parameters()))
    alone = found(stack, x, [])
    assert all(gradient is None for name, gradient in alone.items() if name != "x")
    torch.testing.assert_close(alone["x"], everything["x"], rtol=1e-12, atol=1e-12)


def test_no_gradient_wanted():
    stack, _ = twins(KINDS, SHAPE[1])
    frozen_except(stack, [])
    assert not stack(normal(*SHAPE)).requires_grad
    with torch.no_grad():
        assert not stack(normal(*SHAPE).requires_grad_()).requires_grad


def test_exact_zeros_are_tensors():
    stack, _ = twins(KINDS, SHAPE[1])
    values = found(stack, normal(*SHAPE), dict(stack.named_parameters()))
    zeros = {name for name, value in values.items() if not value.any()}
    # The subsampling block sees its input through batch statistics alone: the bias before it shifts their mean.
    assert zeros == {"0.conv1.bias", "0.conv2.bias", "1.conv1.bias", "2.a21", "2.conv1.bias"}


@pytest.mark.parametrize(("norm", "training"), SETTINGS, ids=str)
def test_gradcheck(norm, training):
    stack, _ = twins(("ssp22", "adaptive"), 2, norm=norm, training=training, activation="silu")
    named = dict(stack.named_parameters())
    named.pop("1.a21")  # an exact zero

    def function(x, *parameters):
        return torch.func.functional_call(stack, dict(zip(named, parameters, strict=True)), (x,))

    x = normal(2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *named.values()), atol=1e-5)


@pytest.mark.parametrize(("norm", "training"), SETTINGS, ids=str)
@pytest.mark.parametrize("kinds", [("ssp22", "adaptive"), ("downsample", "midpoint")], ids=str)
def test_gradgradcheck(kinds, norm, training):
    stack = randomize(make(kinds, 2, norm=norm, activation="silu"), 0, scale=0.1).train(training)
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name.endswith(("b10", "norm1.weight", "conv2.bias")))
    named = {name: p for name, p in stack.named_parameters() if p.requires_grad}

    def function(x, *parameters):
        return torch.func.functional_call(stack, dict(zip(named, parameters, strict=True)), (x,))

    x = normal(3, 2, 3, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x, *named.values()), atol=1e-4)


@pytest.mark.parametrize(("norm", "training"), SETTINGS, ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "learning"])
def test_a_penalty_on_the_inputs_gradient(frozen, activation, norm, training):
    """create_graph=True: values as module by module, no buffer moves after the forward pass."""
    fused, plain = twins(KINDS, SHAPE[1], norm=norm, training=training, activation=activation)

    def run(stack, forward):
        x = normal(*SHAPE).requires_grad_()
        y = forward(x)
        before = copy.deepcopy(dict(stack.named_buffers()))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        assert_same(dict(stack.named_buffers()), before)
        return {"dx": dx, "x": x.grad} | {n: p.grad for n, p in stack.named_parameters()}

    for stack in (fused, plain):
        stack.requires_grad_(not frozen)
    values = run(fused, fused)
    with ssp_fused.use_backend("reference"):
        expected = run(plain, plain)
    assert_same(values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "learning"])
def test_a_penalty_where_the_gradient_is_constant(frozen, activation):
    """A functional that is linear in the output of a piecewise linear chain: its second derivative is a zero."""
    stack, _ = twins(KINDS, SHAPE[1], training=False, activation=activation)
    stack.requires_grad_(not frozen)
    x = normal(*SHAPE).requires_grad_()
    (dx,) = torch.autograd.grad(stack(x).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), x)
    assert again.any() == (activation == "silu")


@pytest.mark.parametrize("modes", cases((True, False), (True, False)), ids=str)
def test_two_forwards_before_one_backward(modes):
    """Against a backward of its own after each forward, module by module."""

    def run(stack, forward, at_once):
        x = normal(2, *SHAPE).requires_grad_()
        losses = []
        for k, mode in enumerate(modes):
            stack.train(mode)
            losses.append(forward(x[k]).square().sum() * (k + 1))
            if not at_once:
                losses.pop().backward()
        if at_once:
            sum(losses).backward()
        values = {"x": x.grad} | {n: p.grad for n, p in stack.named_parameters()}
        return values | dict(stack.named_buffers())

    fused, plain = twins(KINDS, SHAPE[1])
    values = run(fused, fused, at_once=True)
    expected = run(plain, lambda x: module_by_module(plain, x), at_once=False)
    assert_same(values, expected, rtol=1e-9, atol=1e-9)


MODIFIED = "modified by an inplace operation"


@pytest.mark.parametrize("what", ["input", "conv1.weight", "conv2.weight", "norm1.weight"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_edits_in_place_of_what_backward_needs(mode, what):
    stack, _ = twins(KINDS, SHAPE[1], training=mode == "train")
    stack.requires_grad_(mode != "frozen")
    leaf = normal(*SHAPE).requires_grad_()
    (expected,) = torch.autograd.grad(stack(leaf).sum(), leaf)
    x = leaf * 1
    y = stack(x)
    with torch.no_grad():
        (x if what == "input" else stack.get_parameter(f"1.{what}")).add_(1)
    if mode == "frozen" and what == "input":  # bits stand for it
        y.sum().backward()
        assert torch.equal(leaf.grad, expected)
        return
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


def test_an_output_may_be_edited_in_place():
    stack, _ = twins(KINDS, SHAPE[1])
    values = gradients(stack, normal(*SHAPE), lambda x: stack(x).mul_(2))
    expected = gradients(stack, normal(*SHAPE), lambda x: stack(x) * 2)
    assert_same(values, expected)
    following = SSPStack(stack, make(("ssp22",), SHAPE[1] + 1))
    y = following[0](normal(*SHAPE))
    z = following[1](y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match=MODIFIED):
        z.sum().backward()


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_outputs_alias_nothing(mode):
    stack, _ = twins(KINDS, SHAPE[1], training=mode == "train")
    stack.requires_grad_(mode != "frozen")
    x = normal(*SHAPE)
    before = x.clone()
    y, again = stack(x.requires_grad_()), stack(x)
    y.detach().fill_(0)
    assert torch.equal(x, before)
    assert again.any()


@pytest.mark.parametrize("gradient", ["expanded", "rows", "strided"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_any_gradient_of_the_output(mode, gradient):
    """Also one that is not dense, or dense in another layout than the output."""
    stack, _ = twins(KINDS, SHAPE[1], training=mode == "train")
    stack.requires_grad_(mode != "frozen")
    x = normal(*SHAPE).requires_grad_()
    y = stack(x)
    dy = {
        "expanded": lambda: torch.ones((), dtype=torch.float64).expand(y.shape),
        "rows": lambda: normal(*y.shape).to(memory_format=torch.channels_last),
        "strided": lambda: normal(*y.shape, 2)[..., 0],
    }[gradient]()
    wanted = [x, *(p for p in stack.parameters() if p.requires_grad)]
    values = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    expected = torch.autograd.grad(y, wanted, dy.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
