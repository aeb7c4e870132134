"""Networks bring their images to channels last where that is faster, and compute the same in either layout."""

import copy

import pytest
import torch
from accuracy import SEEDS, check, lay_out
from chains import (
    Activation,
    Witness,
    as_evaluated_module_by_module,
    cotangent,
    module_by_module,
    needs_cpu_backend,
    randomize,
)
from schedules import Layouts, Schedule
from torch import nn

import ssp_fused
from ssp_fused import models
from ssp_fused.models.sequential import FusedSequential, norm_relu
from ssp_fused.nn import SSPStack

pytestmark = needs_cpu_backend

# Each with the shape of its images, and the kinds of its blocks between activations of a stem and of a head.
NETWORKS = {
    "cifar": (
        lambda **options: models.sspnet_cifar("ssp22", 1, width=8, **options),
        (3, 16, 16),
        (0, ("ssp22", "downsample", "ssp22", "downsample", "ssp22"), 0),
    ),
    "mnist": (
        lambda **options: models.sspnet_mnist("ssp22", 1, width=8, **options),
        (1, 28, 28),
        (2, ("ssp22",), 1),
    ),
    "wide": (
        lambda **options: models.wide_sspnet(16, 1, "ssp22", width=8, **options),
        (3, 16, 16),
        (0, ("downsample", "ssp22") * 3, 1),
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def network(name, mode="train", **options):
    net = randomize(NETWORKS[name][0](**options), 0, scale=0.15)
    return net.train(mode == "train").requires_grad_(mode != "frozen")


def images(name, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *NETWORKS[name][1], generator=generator)


def outcome(net, x, forward):
    """Logits, gradients of the images and of the parameters, and running statistics."""
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [x, *named.values()], cotangent(y))
    gradients = dict(zip(["d x", *(f"d {name}" for name in named)], found, strict=True))
    return {"y": y.detach(), **gradients, **{n: b.clone() for n, b in net.named_buffers()}}


def plain(net, x, act):
    """Every module of the network called as it is."""
    for name, child in net.named_children():
        inner = (
            child
            if isinstance(child, nn.Sequential) and not isinstance(child, SSPStack)
            else [child]
        )
        for module in inner:
            if name == "fc":
                x = x.flatten(1)
            x = act(x) if isinstance(module, nn.ReLU) else module_by_module(module, x, act)
    return x


@every_network
def test_all_that_follows_the_images_runs_in_rows(name):
    net, x = network(name), images(name).requires_grad_()
    with Layouts() as layouts:
        y = net(x)
        gradients = torch.autograd.grad(y, [x, *net.parameters()], cotangent(y))
    assert layouts.seen == {True}
    assert gradients[0].is_contiguous()
    y = net(x)
    y.backward(cotangent(y))
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in net.parameters())


@every_network
def test_a_step_of_an_attack_copies_no_activation(name):
    net, x = network(name, "frozen"), images(name, batch=8).requires_grad_()
    widest = 8 * 8 * 26 * 26 if name == "mnist" else 8 * 8 * 16 * 16
    with Schedule(smallest=widest) as forward:
        y = net(x)
    with Schedule(smallest=widest) as backward:
        torch.autograd.grad(y, x, cotangent(y))
    # The gradients of a subsampling block's branch and shortcut are added in place.
    assert forward.others == []
    assert set(backward.others) <= {"aten::add_"}
    assert forward.count["stage_norm_act"] > 0 < backward.count["norm_act_backward"]


@pytest.mark.parametrize("case", ["asked", "narrow", "float64", "rows", "mkldnn", "reference"])
def test_layouts_are_left_alone(case):
    """Where the caller asks for it, or where rows are not known to be faster."""
    width = 12 if case == "narrow" else 8
    net = models.sspnet_cifar("ssp22", 1, width=width).eval()
    x = images("cifar")
    if case == "asked":
        net.channels_last_inside = False
    if case == "float64":
        net, x = net.double(), x.double()
    if case == "rows":
        x = x.to(memory_format=torch.channels_last)
    entered = []
    net.conv.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    normalized = []
    net.normalize.register_forward_hook(lambda *args: normalized.append(args[2]))
    backend = "reference" if case == "reference" else "cpu"
    with ssp_fused.use_backend(backend), torch.backends.mkldnn.flags(enabled=case != "mkldnn"):
        net(x)
    assert entered[0] is normalized[0]


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@every_network
def test_rows_inside_are_as_accurate_as_eager(name, mode):
    stem, kinds, head = NETWORKS[name][2]

    def contender(seed):
        net = network(name, mode)
        with Witness() as witness:
            values = outcome(net, images(name, seed), net)
        witness.assert_only_fused_ops_did_the_work()
        masks = witness.masks
        inner = as_evaluated_module_by_module(kinds, masks[stem : len(masks) - head])
        return values | {"masks": masks[:stem] + inner + masks[len(masks) - head :]}

    def eager(seed, layout):
        net, act = network(name, mode), Activation()
        x = lay_out(images(name, seed), layout)
        return outcome(net, x, lambda x: plain(net, x, act)) | {"masks": act.masks}

    def truth(seed, values):
        net, act = network(name, mode).double(), Activation(masks=values["masks"])
        return outcome(net, images(name, seed).double(), lambda x: plain(net, x, act))

    check(contender, eager, truth, f"{name} {mode}", SEEDS)


@every_network
def test_second_derivatives_go_through_the_entry(name):
    """Of a frozen network: what its layout is brought into is linear."""
    net, x = network(name, "frozen"), images(name).requires_grad_()
    (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    with ssp_fused.use_backend("reference"):
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(ddx, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_norm_and_a_relu_in_a_row_are_one_op():
    norms = [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)]
    for norm in norms:
        layers = FusedSequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        other = nn.Sequential(*copy.deepcopy(list(layers)))
        assert layers.state_dict().keys() == other.state_dict().keys()
        x = torch.rand(4, 3, 9, 9)
        with Witness() as witness:
            y = layers(x)
        assert [n for n in witness.names if "norm" in n and not n.startswith("ssp_fused")] == []
        torch.testing.assert_close(y, other(x))
        torch.testing.assert_close(dict(layers.named_buffers()), dict(other.named_buffers()))
        # A norm at the end, and one before another activation, are called as they are.
        torch.testing.assert_close(layers[:2](x), other[:2](x))


@pytest.mark.parametrize("hooked", ["norm", "relu"])
def test_hooks_of_a_norm_and_of_a_relu_are_called(hooked):
    norm, relu, x = nn.BatchNorm2d(8), nn.ReLU(), torch.rand(4, 8, 5, 5)
    expected = torch.relu(copy.deepcopy(norm)(x))
    seen = []
    module = norm if hooked == "norm" else relu
    module.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(norm_relu(norm, relu, x), expected)
    assert len(seen) == 1


def nodes(y):
    """How many chains the graph of y has."""
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [after for after, _ in node.next_functions]
    return sum(node.name() == "ChainBackward" for node in seen)


@pytest.mark.parametrize("case", ["attack", "training", "hook", "setting", "replaced"])
@pytest.mark.parametrize("name", ["cifar", "wide"])
def test_groups_are_one_node_where_nothing_is_learned(name, case):
    """A group that has to be called is; the result is that of every module called as it is."""
    net = network(name, "train" if case == "training" else "frozen")
    called = []
    if case == "hook":
        net.block2.register_forward_hook(lambda *_: called.append("block2"))
    elif case == "setting":
        net.block2.blocks_per_node = 1
    elif case == "replaced":
        net.block2.forward = lambda x: (called.append("block2"), SSPStack.forward(net.block2, x))[1]
    x = images(name).requires_grad_()
    y = net(x)
    apart = {"cifar": 5, "wide": 6}[name]
    assert nodes(y) == {"attack": 1, "training": apart}.get(case, 3)
    assert called == (["block2"] if case in ("hook", "replaced") else [])
    with ssp_fused.use_backend("reference"):
        torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
