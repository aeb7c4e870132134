"""Blocks and stacks for tests: built, randomized, run module by module, and judged by the rule of ``accuracy``.

A kind is a scheme's name, "adaptive" or "downsample"; a tuple of kinds is an ``SSPStack``.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, generator, lay_out
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from ssp_fused import reference, schemes
from ssp_fused.nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack

needs_cpu_backend = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)

BLOCKS = (*schemes.names(), "adaptive", "downsample")
# Torch 2.13's CPU backward of the shortcut's 1x1 convolution with stride 2 writes out of bounds where a channels-last
# input has fewer than 8 channels and even height and width: keep away from it.
ODD = (3, 5, 7, 5)
SLOPES = {"relu": 0.0, "leaky_relu": 0.01}
PLAIN = {"relu": F.relu, "leaky_relu": lambda y: F.leaky_relu(y, 0.01), "silu": F.silu}
PLAIN["identity"] = lambda y: y


class Witness(TorchDispatchMode):
    """Notes every op that runs, and the activation masks that the fused ones imply."""

    def __init__(self):
        super().__init__()
        self.names, self.masks = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name()
        self.names.append(name)
        namespace, _, op = name.removesuffix(".out").partition("::")
        if not namespace.startswith("ssp_fused"):
            return out
        if op in ("stage_batch_norm_act", "stage_norm_act"):
            activation = args[7] if op == "stage_batch_norm_act" else args[8]
        elif op == "stage_group_norm_act":
            activation = args[8]
        else:
            return out
        if activation:
            self.masks.append((kwargs["z"] if "z" in kwargs else out[1]) > 0)
        return out

    def assert_only_fused_ops_did_the_work(self):
        assert any(name.startswith("ssp_fused") for name in self.names)
        for word in ("batch_norm", "group_norm", "relu", "silu", "threshold"):
            left = [n for n in self.names if word in n and not n.startswith("ssp_fused")]
            assert not left, left


def make(kind, channels=5, **options):
    options = {"dtype": torch.float64, **options}
    if isinstance(kind, tuple):
        widths = [channels + kind[:position].count("downsample") for position in range(len(kind))]
        return SSPStack(*(make(k, w, **options) for k, w in zip(kind, widths, strict=True)))
    if kind == "adaptive":
        return AdaptiveSSPBlock(channels, **options)
    if kind == "downsample":
        return PreActDownsample(channels, channels + 1, **options)
    return SSPBlock(channels, kind, **options)


def randomize(module, seed, scale=0.3):
    """Generic values everywhere; those of convolutions have the deviation ``scale``."""
    g = generator(seed, 5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if not name.endswith(("a21", "b10")):
                parameter.copy_(values * (scale if parameter.dim() > 1 else 1.0))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                values = torch.randn(buffer.shape, generator=g, dtype=torch.float64)
                buffer.copy_(values.abs() + 0.5 if "var" in name else values)
    return module


class Activation:
    """The activation of a module-by-module run, noting its masks, or taking another run's in its backward."""

    def __init__(self, name="relu", masks=None):
        self.name, self.given, self.masks = name, masks, []

    def __call__(self, y):
        z = PLAIN[self.name](y)
        if self.name not in SLOPES:
            return z
        if self.given is None:
            self.masks.append(y > 0)
            return z
        positive = self.given[len(self.masks)]
        self.masks.append(positive)
        linear = torch.where(positive, y, SLOPES[self.name] * y)
        return z.detach() + linear - linear.detach()


def module_by_module(block, x, act=None):
    """The block or stack, or any other module, with each submodule called as it is."""
    if act is None and hasattr(block, "activation"):
        act = Activation(block.activation)

    def branch(u):
        return block.conv2(act(block.norm2(block.conv1(act(block.norm1(u))))))

    match block:
        case SSPStack():
            for module in block:
                x = module_by_module(module, x, act)
            return x
        case AdaptiveSSPBlock():
            return reference.adaptive_step(x, branch, block.a21, block.b10, block.step_size)
        case PreActDownsample():
            return block.downsample(act(block.norm1(x))) + branch(x)
        case SSPBlock():
            return reference.ssp_step(x, branch, block.scheme, block.step_size)
        case _:
            return block(x)


def as_evaluated_module_by_module(kind, masks):
    """The fused blocks compute a repeated evaluation once."""
    if not masks:
        return masks
    ordered = []
    for block in kind if isinstance(kind, tuple) else (kind,):
        order = {"adaptive": (0, 1, 0, 1, 2, 3), "downsample": (0, 0, 1)}.get(block)
        if order is None:
            order = range(2 * schemes.get(block).stages)
        ordered += [masks[k] for k in order]
        masks = masks[max(order) + 1 :]
    assert not masks
    return ordered


def cotangent(y):
    """A generic gradient for ``y``."""
    return torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)


def results(block, x, forward):
    """Output, gradients and buffers after one forward and one backward pass."""
    x = x.requires_grad_()
    y = forward(x)
    y.backward(cotangent(y))
    values = {"y": y.detach(), "dx": x.grad}
    values |= {f"d {name}": p.grad for name, p in block.named_parameters()}
    return values | {name: b.clone() for name, b in block.named_buffers()}


def judge(
    kind,
    shape,
    *,
    dtype=torch.float32,
    layout="planes",
    training=True,
    frozen=False,
    scale=0.3,
    autocast=None,
    device="cpu",
    **options,
):
    """The accuracy rule for a block or a stack, on one device: convolutions err there as they do.

    ``frozen``: no parameter requires a gradient; ``autocast``: the dtype of a forward pass under it.
    """
    act_name = options.get("activation", "relu")

    def prepared(seed, to):
        block = randomize(make(kind, shape[1], **options), seed, scale).to(dtype).to(device, to)
        x = torch.randn(shape, generator=generator(seed, 6), dtype=torch.float64)
        return block.train(training).requires_grad_(not frozen), x.to(dtype).to(device, to)

    def cast(forward):
        def under_autocast(x):
            with torch.autocast(device, dtype=autocast):
                return forward(x)

        return forward if autocast is None else under_autocast

    def contender(seed):
        block, x = prepared(seed, dtype)
        with Witness() as witness:
            values = results(block, lay_out(x, layout), cast(block))
        witness.assert_only_fused_ops_did_the_work()
        assert frozen or all(v is not None for v in values.values())
        if autocast is not None:  # the dtype that they were rounded to on their way
            values |= {
                n: v.to(autocast) for n, v in values.items() if v is not None and n[0] in "yd"
            }
        return values | {"masks": as_evaluated_module_by_module(kind, witness.masks)}

    def eager(seed, other):
        block, x = prepared(seed, dtype)
        act = Activation(act_name)
        values = results(block, lay_out(x, other), cast(lambda x: module_by_module(block, x, act)))
        return values | {"masks": act.masks}

    def truth(seed, values):
        block, x = prepared(seed, torch.float64)
        act = Activation(act_name, values["masks"])
        return results(block, x, lambda x: module_by_module(block, x, act))

    check(contender, eager, truth, f"{kind} {shape} {dtype} {layout} {training} {options}")


def gradients(block, x, forward=None, *, only=None):
    """Of a generic functional of the output, by x and by each parameter of ``only`` (all of them unless given)."""
    x = x.detach().clone().requires_grad_()
    y = (forward or block)(x)
    named = dict(block.named_parameters()) if only is None else only
    found = torch.autograd.grad(y, [x, *named.values()], cotangent(y))
    return dict(zip(["x", *named], found, strict=True))


def assert_same(values, expected, what="", **tolerances):
    """Two dictionaries of tensors are close, or equal bit for bit unless tolerances are given."""
    assert values.keys() == expected.keys(), what
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    for name, value in values.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda m, name=name: f"{what} {name}: {m}", **tolerances
        )


def twins(kind, channels=5, *, training=True, seed=0, **options):
    """Two copies of a randomized module, one to run fused, one module by module."""
    module = randomize(make(kind, channels, **options), seed).train(training)
    return module, copy.deepcopy(module)
