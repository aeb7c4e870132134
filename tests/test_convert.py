"""``convert``: published and other residual blocks, swapped in place, compute what they computed."""

import copy

import published
import pytest
import torch
import torch.nn.functional as F
from converted import DATASETS, PreAct, assert_same_function, fused_blocks, generic
from torch import nn

import ssp_fused
from ssp_fused.nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack

MODELS = ("res", "midrk2", "ssp2", "ssp3", "ark")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def three_steps(model, optimizer, shape, steps=3):
    random = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, *shape, generator=random, dtype=torch.float64)
        loss = F.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("norm", ["b", "g", "l", "i"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_published_networks(dataset, model, norm):
    """Three steps of training, with an optimizer made before, and evaluation afterwards."""
    shape = DATASETS[dataset]
    original = generic(published.network(dataset, model, norm))
    converted = copy.deepcopy(original)
    optimizer = sgd(converted)
    parameters, state = list(converted.parameters()), converted.state_dict()
    assert ssp_fused.convert(converted) is converted
    assert len(fused_blocks(converted)) == sum(
        isinstance(m, (published.ArkBlock, published.RKBlock2, published._Holder))
        or (type(m) is published.ResBlock and not name.endswith("block"))
        for name, m in original.named_modules()
    )
    for old, new in zip(parameters, converted.parameters(), strict=True):
        assert old is new
    assert list(converted.state_dict()) == list(state)
    losses = three_steps(converted, optimizer, shape)
    assert losses == pytest.approx(three_steps(original, sgd(original), shape), rel=1e-9)
    torch.testing.assert_close(converted.state_dict(), original.state_dict(), rtol=1e-9, atol=1e-10)
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    outputs = [model.eval()(x) for model in (converted, original)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_kinds_of_blocks_and_stacks():
    model = ssp_fused.convert(published.network("cifar10", "ark", blocks=2))
    assert [type(m) for m in (model.block1, model.block2, model.block3)] == [SSPStack] * 3
    assert all(isinstance(block, AdaptiveSSPBlock) for block in model.block1)
    assert all(isinstance(block, SSPBlock) for block in (*model.block2, *model.block3))
    assert [model.block2[0].scheme.name, model.block3[1].scheme.name] == ["euler", "ssp22"]
    assert isinstance(model.sub1, PreActDownsample) and isinstance(model.sub2, PreActDownsample)
    assert "SSPStack" in repr(model) and "ssp22, activation=relu, step_size=1" in repr(model)


def test_state_dict_loads_strictly_both_ways():
    original = published.network("cifar10", "ssp3")
    converted = ssp_fused.convert(published.network("cifar10", "ssp3"))
    converted.load_state_dict(original.state_dict(), strict=True)
    torch.testing.assert_close(converted.state_dict(), original.state_dict(), rtol=0, atol=0)
    published.network("cifar10", "ssp3").load_state_dict(converted.state_dict(), strict=True)


def test_optimizer_made_before_goes_on_working():
    """Momentum gathered before the conversion acts after it."""
    whole, half = (generic(published.network("mnist", "ssp2")) for _ in range(2))
    optimizers = [sgd(whole), sgd(half)]
    losses = three_steps(whole, optimizers[0], (1, 17, 17), steps=2)
    assert losses == three_steps(half, optimizers[1], (1, 17, 17), steps=2)
    ssp_fused.convert(half)
    for model, optimizer in zip((whole, half), optimizers, strict=True):
        three_steps(model, optimizer, (1, 17, 17))
    torch.testing.assert_close(half.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-10)


def test_fused_ops_do_the_work():
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    block = ssp_fused.convert(published.SSPBlock2(8, 8))
    with Watch():
        block(torch.randn(2, 8, 5, 5)).sum().backward()
    assert called.count("ssp_fused::stage_batch_norm_act") == 4
    assert not any("batch_norm" in name and "ssp_fused" not in name for name in called)


def test_the_root_may_be_a_block_and_a_block_may_be_shared():
    block = published.SSPBlock3(8, 8)
    original = generic(copy.deepcopy(block))
    generic(block)
    twice = nn.Sequential(nn.Sequential(block), nn.ModuleDict({"again": block}))
    converted = ssp_fused.convert(block)
    assert isinstance(converted, SSPBlock) and converted is not block
    assert_same_function(converted, original)
    assert ssp_fused.convert(converted) is converted
    both = ssp_fused.convert(twice)
    assert both[0][0] is both[1]["again"] and isinstance(both[0], SSPStack)


@pytest.mark.parametrize("coef", [0.5, -2.0])
@pytest.mark.parametrize("make", [published.ResBlock, published.SSPBlock2, published.SSPBlock3])
def test_coef_is_the_step_size_and_is_read_when_called(make, coef):
    original = generic(make(8, 8))
    converted = ssp_fused.convert(copy.deepcopy(original))
    for module in (original, converted):
        getattr(module, "block", module).coef = coef
    assert converted.step_size == coef
    assert_same_function(converted, original)


@pytest.mark.parametrize("coef", [1, 0.5])
def test_subsampling_block(coef):
    down = published.shortcut(8, 16, "b")
    original = generic(published.ResBlock(8, 16, coef=coef, stride=2, downsample=down))
    converted = ssp_fused.convert(copy.deepcopy(original))
    assert isinstance(converted, PreActDownsample)
    assert_same_function(converted, original)
    assert converted.n1.num_batches_tracked == original.n1.num_batches_tracked


def test_a_network_that_has_run_is_converted():
    """The published ArkBlock leaves tensors with a history in its attributes."""
    original = generic(published.ArkBlock(8, 8))
    converted = copy.deepcopy(original)
    converted(torch.randn(2, 8, 5, 5, dtype=torch.float64))
    original.load_state_dict(converted.state_dict())
    assert_same_function(ssp_fused.convert(converted), original)
    assert isinstance(ssp_fused.convert(original), AdaptiveSSPBlock)


def test_adaptive_a21_keeps_a_gradient_of_exactly_zero():
    block = ssp_fused.convert(published.ArkBlock(8, 8))
    block(torch.randn(2, 8, 5, 5)).sum().backward()
    assert block.a21.grad == 0 and block.b10.grad != 0


def wide_shortcut(stride=1):
    return nn.Conv2d(8, 12, 1, stride=stride, bias=False)


GENERIC = {
    "bn": {},
    "norm": {"names": ("norm1", "norm2")},
    "n": {"names": ("n1", "n2")},
    "gn": {"names": ("gn1", "gn2"), "norm": lambda planes: nn.GroupNorm(4, planes)},
    "silu": {"act": F.silu},
    "leaky": {"act": nn.LeakyReLU(0.01)},
    "linear": {"act": nn.Identity()},
    "wide": {"out": 12, "shortcut": wide_shortcut()},
    "strided": {"out": 12, "stride": 2, "shortcut": nn.Sequential(wide_shortcut(2))},
    "of input": {"out": 12, "shortcut": wide_shortcut(), "of_input": True},
    "with norm": {"out": 12, "shortcut": nn.Sequential(wide_shortcut(), nn.BatchNorm2d(12))},
    "empty": {"shortcut": nn.Sequential(), "of_input": True},
}


@pytest.mark.parametrize("kind", GENERIC)
def test_any_preactivation_block(kind):
    original = generic(nn.Sequential(PreAct(**copy.deepcopy(GENERIC[kind]))))
    converted = ssp_fused.convert(copy.deepcopy(original))
    assert len(fused_blocks(converted)) == 1
    assert isinstance(converted, SSPStack)
    assert_same_function(converted, original)
    with ssp_fused.use_backend("reference"):
        assert_same_function(converted, original)


class PostAct(PreAct):
    """The attributes of a pre-activation block, in another order of evaluation."""

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + x)


class Scaled(PreAct):
    def forward(self, x):
        return x + 0.1 * (super().forward(x) - x)


class Frozen(PreAct):
    def train(self, mode=True):
        return super().train(False)


class Detached(PreAct):
    def forward(self, x):
        return x.detach() + super().forward(x) - x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (PostAct, "on random input it computes neither"),
        (Scaled, "on random input it computes neither"),
        (Detached, "on random input it computes neither"),
        (lambda: PreAct(drop=0.5), "on random input it computes neither"),
        (lambda: PreAct(act=torch.tanh), "on random input it computes neither"),
        (Frozen, "its class overrides train of nn.Module"),
        (lambda: PreAct(norm=nn.InstanceNorm2d), "its norm1 is a InstanceNorm2d, none of Batch"),
        (lambda: with_attribute(PreAct(), "conv2", nn.Linear(8, 8)), "its conv2 is a Linear"),
        (lambda: with_attribute(PreAct(), "forward", lambda x: x), "its forward was replaced"),
        (lambda: PreAct(out=12), "could not be tried on random input (RuntimeError: The size"),
        (lambda: PreAct().to("meta"), "could not be tried on random input (NotImplementedError"),
    ],
)
def test_what_is_not_converted_is_listed(make, reason, caplog):
    module = make()
    model = nn.ModuleDict({"some": nn.Sequential(module)})
    random = torch.get_rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert ssp_fused.convert(model)["some"][0] is module
    (record,) = caplog.records
    message = f"not converted: some.0 ({type(module).__name__}): "
    assert record.levelname == "WARNING" and record.message.startswith(message)
    assert reason in record.message
    assert torch.equal(torch.get_rng_state(), random)
    assert all(v.is_meta or torch.equal(v, state[name]) for name, v in model.state_dict().items())


def with_attribute(module, name, value):
    setattr(module, name, value)
    return module


def test_names_alone_convert_nothing(caplog):
    """A class with a published name that computes something else, and a model without blocks."""

    class RKBlock2(published.RKBlock2):
        def forward(self, x):
            middle = x + 0.5 * self.residual(x)
            return x + self.residual(middle)

    assert type(ssp_fused.convert(RKBlock2(8, 8))) is RKBlock2
    assert caplog.records[-1].message.startswith("not converted: RKBlock2: on random input")
    ssp_fused.convert(nn.Linear(3, 3))
    assert caplog.records[-1].message == "nothing to convert: no residual block in a Linear"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        ssp_fused.convert({})


def test_own_networks_stay_as_they_are(caplog):
    model = ssp_fused.models.sspnet_cifar(blocks=1, width=8)
    modules = list(model.modules())
    assert list(ssp_fused.convert(model).modules()) == modules
