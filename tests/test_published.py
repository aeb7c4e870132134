"""State dicts of the published networks: what is loaded computes and trains as the original; what is refused."""

import re
from collections import OrderedDict

import published
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssp_fused
from ssp_fused import models, schemes

# The published letter, and what from_sspnet must be told where tensors can't tell.
NORMS = {"b": {}, "g": {}, "l": {"num_groups": 1}, "i": {"norm": "instance"}}
# Odd maps all the way down, 3x3 at the end.
SIDE = {"cifar10": 9, "tinyimagenet": 17, "mnist": 17, "fmnist": 17}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CPU = ssp_fused.available_backends()["cpu"]
needs_cpu = pytest.mark.skipif(CPU is not None, reason=f"cpu backend: {CPU}")


def double(dataset="cifar10", model="ssp2", norm="b", blocks=1, **sizes):
    network = published.network(dataset, model, norm, blocks, **sizes)
    return published.randomized(network, seed=1).double()


def images(dataset="cifar10", seed=2):
    channels = 1 if dataset.endswith("mnist") else 3
    shape = (3, channels, SIDE[dataset], SIDE[dataset])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def our_key(key):
    """The name here of a published network's parameter or buffer."""
    return re.sub(r"\.n([12])\.", r".norm\1.", key.replace(".block.", "."))


def without_aliases(state):
    return {k: v for k, v in state.items() if ".residual." not in k and ".f." not in k}


def run(network, x):
    """Logits, gradients with respect to the images, and to each parameter."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    logits = network(x)
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    return logits, x.grad, {key: p.grad for key, p in network.named_parameters()}


def assert_same_run(ours, theirs, x):
    logits, d_x, gradients = run(ours, x)
    expected_logits, expected_d_x, expected = run(theirs, x)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)
    torch.testing.assert_close(d_x, expected_d_x, **CLOSE)
    expected = {our_key(key): gradient for key, gradient in expected.items()}
    torch.testing.assert_close(gradients, expected, **CLOSE)


def assert_same_training(ours, theirs, dataset):
    optimizers = [
        torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        for network in (ours, theirs)
    ]
    for step in range(3):
        assert_same_run(ours, theirs, images(dataset, seed=step))
        for optimizer in optimizers:
            optimizer.step()
    expected = {our_key(k): v for k, v in without_aliases(theirs.state_dict()).items()}
    torch.testing.assert_close(dict(ours.state_dict()), expected, **CLOSE)
    assert_same_run(ours.eval(), theirs.eval(), images(dataset))


def check_computes_and_trains_as_the_original(dataset, model, norm):
    sizes = {"init_channel": 8} if dataset == "tinyimagenet" else {}
    theirs = double(dataset, model, norm, blocks=2 if norm == "b" else 1, **sizes)
    ours = models.from_sspnet(theirs.state_dict(), dataset=dataset, model=model, **NORMS[norm])
    assert_same_training(ours, theirs, dataset)


@needs_cpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", published.BLOCKS)
@pytest.mark.parametrize("dataset", published.NETWORKS)
def test_computes_and_trains_as_the_original(dataset, model, norm):
    with ssp_fused.use_backend("cpu"):
        check_computes_and_trains_as_the_original(dataset, model, norm)


@pytest.mark.parametrize("norm", ["b", "l"])
@pytest.mark.parametrize("model", published.BLOCKS)
@pytest.mark.parametrize("dataset", ["cifar10", "mnist"])
def test_in_plain_pytorch(dataset, model, norm):
    with ssp_fused.use_backend("reference"):
        check_computes_and_trains_as_the_original(dataset, model, norm)


@needs_cpu
def test_a21_gets_a_gradient_of_exactly_zero():
    ours = models.from_sspnet(double(model="ark").state_dict(), model="ark")
    _, _, gradients = run(ours, images())
    assert torch.equal(gradients["block1.0.a21"], torch.zeros((), dtype=torch.float64))
    assert gradients["block1.0.b10"] != 0


def test_kinds_may_differ_from_group_to_group():
    kinds = ("ssp3", "ark", "midrk2")
    theirs = double(model=kinds)
    ours = models.from_sspnet(theirs.state_dict(), model=kinds)
    assert_same_run(ours, theirs, images())
    assert list(models.to_sspnet(ours)) == list(theirs.state_dict())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", published.BLOCKS)
@pytest.mark.parametrize("dataset", published.NETWORKS)
def test_round_trip_is_bitwise_and_loads_strictly(dataset, model, norm):
    theirs = double(dataset, model, norm, init_channel=4)
    state = theirs.state_dict()
    ours = models.from_sspnet(state, dataset=dataset, model=model, **NORMS[norm])
    back = models.to_sspnet(ours)
    assert isinstance(back, OrderedDict)
    assert list(back) == list(state)
    assert all(back[key].dtype == state[key].dtype for key in state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    published.network(dataset, model, norm, init_channel=4).load_state_dict(back, strict=True)


def test_aliases_and_a_wrapper_s_prefix_may_be_there_or_not():
    state = double(model="ark").state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    expected = models.from_sspnet(state, model="ark").state_dict()
    for given in (without_aliases(state), wrapped, without_aliases(wrapped)):
        loaded = models.from_sspnet(given, model="ark").state_dict()
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_sizes_are_read_off():
    theirs = double("mnist", "ssp3", blocks=4, init_channel=12, in_channels=2, num_classes=7)
    ours = models.from_sspnet(theirs.state_dict(), dataset="fmnist", model="ssp3")
    assert len(ours.blocks) == 4
    assert ours.downsample[0].weight.shape == (12, 2, 3, 3)
    assert ours.linear[4].out_features == 7
    theirs = double("tinyimagenet", "res", "g", init_channel=16, in_channels=1, num_classes=5)
    ours = models.from_sspnet(theirs.state_dict(), dataset="tinyimagenet", model="res")
    assert ours.conv.weight.shape == (16, 1, 3, 3)
    assert [ours.get_submodule(f"block{i}.0.norm1").num_groups for i in (1, 2, 3, 4)] == [
        16,
        32,
        32,
        32,
    ]
    assert ours.fc.out_features == 5


def test_group_norms_are_as_told():
    state = double(norm="g").state_dict()
    for norm, arguments in NORMS.items():
        if norm != "b":
            loaded = models.from_sspnet(state, **arguments)
            same = published.network("cifar10", "ssp2", norm)
            for ours, theirs in (("norm1", "n1"), ("downsample.1", "downsample.1")):
                expected = same.sub2.get_submodule(theirs).num_groups
                assert loaded.sub2.get_submodule(ours).num_groups == expected
    models.from_sspnet(state, norm="group", num_groups=8)
    models.from_sspnet(double().state_dict(), norm="batch")


def test_loaded_tensors_are_copies_of_the_same_dtype():
    theirs = double()
    theirs.block1.to(torch.bfloat16)
    state = theirs.state_dict()
    before = torch.get_rng_state()
    ours = models.from_sspnet(state)
    assert torch.equal(torch.get_rng_state(), before), "values were drawn, only to be replaced"
    assert ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.block1[0].conv1.weight.dtype == torch.bfloat16
    assert ours.fc.weight.dtype == torch.float64
    with torch.no_grad():
        for tensor in (*ours.parameters(), *ours.buffers()):
            tensor.zero_()
    assert all(value.any() for value in state.values())


def test_written_tensors_share_the_module_s_storage():
    ours = models.sspnet_cifar("ssp33", 1, width=4)
    state = models.to_sspnet(ours)
    weight = ours.block1[0].conv2.weight
    for key in ("block1.0.block.conv2.weight", "block1.0.block.residual.5.weight"):
        assert state[key].data_ptr() == weight.data_ptr()
        assert not state[key].requires_grad


def test_networks_of_ours_are_written_and_computed_alike_on_normalized_images():
    ours = models.sspnet_tiny_imagenet(("adaptive", "euler", "ssp22", "sspnet-midrk2"), 2, width=8)
    theirs = published.network(
        "tinyimagenet", ("ark", "res", "ssp2", "midrk2"), blocks=2, init_channel=8
    )
    theirs.load_state_dict(models.to_sspnet(ours), strict=True)
    x = images()
    logits = ours.double()(x)
    torch.testing.assert_close(logits, theirs.double()(ours.normalize(x)), **CLOSE)


@pytest.mark.parametrize("dataset", published.NETWORKS)
def test_normalization_is_the_caller_s(dataset):
    net = models.from_sspnet(double(dataset, init_channel=4).state_dict(), dataset=dataset)
    assert isinstance(net.normalize, nn.Identity)
    mean, std = models.PUBLISHED_NORMALIZATION[dataset]
    x = images(dataset)
    shape = (1, -1, 1, 1)
    expected = net.eval()((x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    net.normalize = models.Normalize(mean, std)
    torch.testing.assert_close(net(x), expected)


def test_published_normalization_keeps_the_slip():
    assert models.PUBLISHED_NORMALIZATION["cifar10"][0] == (0.4914, 0.4822, 0.2265)
    assert models.PUBLISHED_NORMALIZATION["mnist"] == ((0.0,), (1.0,))


def changed(key, value, **arguments):
    """A state dict of the double with one tensor replaced, or removed where `value` is None."""
    state = dict(double(init_channel=4, **arguments).state_dict())
    state[key] = value
    return state if value is not None else {k: v for k, v in state.items() if k != key}


GROUPED = {"norm": "g", "init_channel": 4}


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: changed("fc.bias", None), {}, ValueError, r"'ssp2', got 1 missing \(fc\.bias\)$"),
        (
            lambda: changed("block2.0.block.n2.running_var", None),
            {},
            ValueError,
            r"1 missing \(block2\.0\.block\.n2\.running_var\)",
        ),
        (lambda: changed("head.w", torch.ones(1)), {}, ValueError, r"got 1 foreign \(head\.w\)$"),
        (
            lambda: double("cifar10", "res", init_channel=4).state_dict(),
            {},
            ValueError,
            r"cifar10 network of model 'ssp2', got 42 missing "
            r"\(block1\.0\.block\.n1\.weight, block1\.0\.block\.n1\.bias, .*, \.\.\.\) "
            r"and 84 foreign \(block1\.0\.n1\.weight, .*, \.\.\.\)$",
        ),
        (lambda: {}, {}, ValueError, r"50 missing \(conv\.weight, .*, \.\.\.\)$"),
        (
            lambda: changed("conv.weight", None),
            {},
            ValueError,
            r"1 missing \(conv\.weight\)$",
        ),
        (
            lambda: changed("block1.0.block.conv1.weight", torch.ones(4, 4, 5, 5).double()),
            {},
            ValueError,
            r"\['block1\.0\.block\.conv1\.weight'\] must have shape \(4, 4, 3, 3\), "
            r"got \(4, 4, 5, 5\)",
        ),
        (
            lambda: changed("conv.weight", torch.ones(()).double()),
            {},
            ValueError,
            r"\['conv\.weight'\] must have shape \(16, 3, 3, 3\), got \(\)",
        ),
        (
            lambda: changed("block3.0.block.residual.2.bias", torch.zeros(16).double()),
            {},
            ValueError,
            r"\['block3\.0\.block\.residual\.2\.bias'\] must equal "
            r"state_dict\['block3\.0\.block\.conv1\.bias'\], whose alias it is",
        ),
        (
            lambda: changed("sub1.residual.3.num_batches_tracked", torch.tensor(0)),
            {},
            ValueError,
            r"\['sub1\.residual\.3\.num_batches_tracked'\] must equal",
        ),
        (lambda: changed("epoch", 3), {}, TypeError, r"\['epoch'\] must be a tensor, got int"),
        (
            lambda: changed("fc.bias", torch.zeros(10, dtype=torch.int64)),
            {},
            TypeError,
            r"\['fc\.bias'\] must be float32, .*, got torch\.int64",
        ),
        (
            lambda: changed("sub1.n1.num_batches_tracked", torch.tensor(3.0)),
            {},
            TypeError,
            r"\['sub1\.n1\.num_batches_tracked'\] must be torch\.int64, got torch\.float32",
        ),
        (lambda: {3: torch.ones(1)}, {}, TypeError, "keys must be strings, got 3"),
        (lambda: [torch.ones(1)], {}, TypeError, "state_dict must be a mapping .*, got list"),
        (dict, {"dataset": "cifar"}, ValueError, r"dataset 'cifar'; known: cifar10, .*imagenet"),
        (dict, {"model": "ssp22"}, ValueError, "model 'ssp22'; known: res, midrk2, .*, ark"),
        (dict, {"model": ("res", "ssp22", "ssp2")}, ValueError, "unknown model 'ssp22'"),
        (dict, {"model": ("res", "ssp2")}, ValueError, "one name or 3 names, .*, got 2"),
        (dict, {"model": None}, TypeError, "model must be a name or a sequence .*, got NoneType"),
        (dict, {"norm": "b"}, ValueError, "unknown norm 'b'; known: batch, group, instance"),
        (
            lambda: double(init_channel=4).state_dict(),
            {"norm": "group"},
            ValueError,
            "norm must fit the state_dict, which holds running statistics; got 'group'",
        ),
        (
            lambda: double(**GROUPED).state_dict(),
            {"norm": "batch"},
            ValueError,
            "which holds no running statistics; got 'batch'",
        ),
        (
            lambda: double(init_channel=4).state_dict(),
            {"num_groups": 2},
            ValueError,
            "num_groups must be None for norm 'batch', got 2",
        ),
        (
            lambda: double(**GROUPED).state_dict(),
            {"num_groups": 3},
            ValueError,
            "num_groups must divide the 4 channels, got 3",
        ),
        (
            lambda: double(**GROUPED).state_dict(),
            {"num_groups": 0},
            ValueError,
            "num_groups must be a positive integer, got 0",
        ),
        (
            lambda: double(norm="l", init_channel=20).state_dict(),
            {},
            ValueError,
            "num_groups must divide the 40 channels, got 32",
        ),
    ],
)
def test_refused_state_dicts_are_explained(make, arguments, error, message):
    with pytest.raises(error, match=message):
        models.from_sspnet(make(), **arguments)


def test_uneven_groups_of_blocks_lack_keys():
    state = double(blocks=2, init_channel=4).state_dict()
    fewer = {key: value for key, value in state.items() if not key.startswith("block1.1.")}
    with pytest.raises(ValueError, match=r"14 missing \(block1\.1\.block\.n1\.weight"):
        models.from_sspnet(fewer)


def test_a_diverged_network_is_loaded():
    theirs = double(init_channel=4)
    nn.init.constant_(theirs.block2[0].block.conv1.weight, float("nan"))
    loaded = models.from_sspnet(theirs.state_dict())
    assert loaded.block2[0].conv1.weight.isnan().all()


def put(name, value):
    def change(net):
        owner, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(owner), attribute, value)

    return change


OTHER_EULER = schemes.ShuOsher("euler", ((1.0,),), ((0.5,),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("block2.0.scheme", schemes.get("ssp104")), "block2.0 .*'ssp104', not one of euler,"),
        (put("block2.0.scheme", OTHER_EULER), "block2.0 .* its scheme is 'euler', not"),
        (put("block3.0.activation", "silu"), "block3.0 .* activation is 'silu', not 'relu'"),
        (put("sub1.activation", "silu"), "sub1 .* activation is 'silu'"),
        (put("block1.0.step_size", 0.5), "block1.0 .* step_size is 0.5, not 1"),
        (
            put("block1.0.conv2", nn.Conv2d(4, 4, 3, padding=1, bias=False)),
            "block1.0 .* conv2 holds weight, not weight and bias$",
        ),
        (put("block1.0.norm2", nn.Identity()), "block1.0 .* norm2 holds nothing, not weight and"),
        (
            put("block1.0", nn.Identity()),
            "block1.0 must be as published, but it is of type Identity",
        ),
    ],
)
def test_blocks_without_a_published_counterpart_are_named(change, message):
    net = models.sspnet_cifar(("adaptive", "euler", "ssp22"), 1, width=4)
    change(net)
    with pytest.raises(ValueError, match=rf"^module\.{message}"):
        models.to_sspnet(net)


def test_other_networks_are_not_written():
    with pytest.raises(TypeError, match="SSPNet or SSPNetMNIST, got WideSSPNet"):
        models.to_sspnet(models.wide_sspnet(16, 1, width=4))
