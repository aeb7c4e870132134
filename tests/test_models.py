"""Published layouts: structure, names, initialization, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from ssp_fused import models, schemes
from ssp_fused.nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack

BUILDERS = {
    "cifar": (models.sspnet_cifar, (3, 16, 16), 10),
    "mnist": (models.sspnet_mnist, (1, 28, 28), 10),
    "tiny_imagenet": (models.sspnet_tiny_imagenet, (3, 16, 16), 200),
}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("name", BUILDERS)
def test_maps_images_to_logits(name: str, norm: str) -> None:
    build, shape, classes = BUILDERS[name]
    logits = build("ssp33", 1, norm=norm, width=8)(torch.rand(2, *shape))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", BUILDERS)
def test_schemes_share_their_parameters_with_the_resnet_twin(name: str) -> None:
    build, _, _ = BUILDERS[name]
    twin = build("euler", 2, width=8).state_dict()
    for scheme in ("ssp22", "ssp33", "ssp104"):
        state = build(scheme, 2, width=8).state_dict()
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in twin.items()
        }


def test_published_sizes() -> None:
    # Counted by hand: stem 448, blocks of width w have 2 (9 w^2 + w) + 4 w, transitions from w to
    # 2w have 18 w^2 + 36 w^2 + 2 w^2 + 4 w (biases) + 2 w + 4 w + 4 w (norms), head 650.
    def block(w: int) -> int:
        return 2 * (9 * w * w + w) + 4 * w

    def down(w: int) -> int:
        return 56 * w * w + 14 * w

    expected = 448 + 650 + down(16) + down(32) + 6 * (block(16) + block(32) + block(64))
    assert parameter_count(models.sspnet_cifar()) == expected
    # WRN-28-10 has 36,479,194; ours adds biases of 3x3 convolutions and norms of the shortcuts.
    wide = models.wide_sspnet(28, 10, "euler")
    convolutions = [m for m in wide.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    shortcuts = [m.downsample[1] for m in wide.modules() if isinstance(m, PreActDownsample)]
    extra = sum(m.out_channels for m in convolutions) + 2 * sum(m.num_features for m in shortcuts)
    assert parameter_count(wide) - extra == 36_479_194


def test_module_names() -> None:
    names = [name for name, _ in models.sspnet_cifar(blocks=2).named_children()]
    body = ["conv", "block1", "sub1", "block2", "sub2", "block3", "avg", "fc"]
    assert [name for name in names if name != "normalize"] == body
    assert "block1.1.conv2.weight" in models.sspnet_cifar(blocks=2).state_dict()
    names = [name for name, _ in models.sspnet_tiny_imagenet(blocks=1).named_children()]
    assert names[-5:] == ["block3", "sub3", "block4", "avg", "fc"]
    state = models.sspnet_mnist(blocks=1).state_dict()
    for key in ("downsample.0.weight", "downsample.4.running_mean", "downsample.6.bias"):
        assert key in state
    for key in ("blocks.0.norm1.weight", "linear.0.weight", "linear.4.weight"):
        assert key in state


def test_one_scheme_per_group() -> None:
    model = models.sspnet_cifar(("adaptive", "euler", "ssp22"), 2)
    assert all(isinstance(block, AdaptiveSSPBlock) for block in model.block1)
    assert [block.scheme.name for block in model.block2] == ["euler"] * 2
    assert [block.scheme.name for block in model.block3] == ["ssp22"] * 2
    assert isinstance(model.block1, SSPStack)
    model = models.wide_sspnet(16, 1, ("euler", "ssp22", "ssp33"))
    assert [block.scheme.name for block in model.block3] == ["ssp33"]
    assert all(isinstance(block, SSPBlock) for block in model.block3)


def test_published_names_resolve() -> None:
    assert models.resolve_scheme("ssp2", 3) == ("ssp22",) * 3
    assert models.resolve_scheme("midrk2", 1) == ("sspnet-midrk2",)
    assert models.resolve_scheme("ark", 3) == ("adaptive", "euler", "ssp22")
    assert models.resolve_scheme("ark", 4) == ("adaptive", "euler", "ssp22", "ssp22")
    assert models.resolve_scheme("ark", 1) == ("adaptive",)
    assert models.resolve_scheme("ssp33, euler,ssp22", 3) == ("ssp33", "euler", "ssp22")
    for name in (*schemes.names(), "adaptive"):
        assert models.resolve_scheme(name, 2) == (name, name)
    with pytest.raises(ValueError, match=r"'ssp4'.*known: res,.*ssp33"):
        models.resolve_scheme("ssp4", 3)
    with pytest.raises(ValueError, match="3 names"):
        models.resolve_scheme("ssp22,ssp33", 3)


@pytest.mark.parametrize("blocks", [1, 4])
def test_published_initialization(blocks: int) -> None:
    torch.manual_seed(0)
    model = models.sspnet_cifar("ssp22", blocks)
    for convolution in (model.block3[0].conv1, model.sub2.conv2, model.sub2.downsample[0]):
        fan_in = convolution.weight[0].numel()
        bound = math.sqrt(6 / ((1 + 5 * blocks**2) * fan_in))
        largest = convolution.weight.abs().max().item()
        assert 0.99 * bound < largest <= bound
        if convolution.bias is not None:
            assert convolution.bias.abs().max() <= 1 / math.sqrt(fan_in)
            assert convolution.bias.abs().max() > 0.8 / math.sqrt(fan_in)
    weight = model.block3[0].norm1.weight
    assert 0 <= weight.min() < 0.15 and 0.85 < weight.max() <= 1
    assert not any(
        module.bias.any() for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    )
    grouped = models.sspnet_cifar("ssp22", blocks, norm="group")
    assert torch.equal(grouped.block1[0].norm1.weight, torch.ones(16))


def test_mnist_keeps_default_initialization() -> None:
    torch.manual_seed(0)
    model = models.sspnet_mnist(blocks=1)
    convolution = model.blocks[0].conv1
    bound = 1 / math.sqrt(convolution.weight[0].numel())
    assert 0.99 * bound < convolution.weight.abs().max().item() <= bound
    assert torch.equal(model.blocks[0].norm1.weight, torch.ones(64))


def test_normalization_is_inside_and_outside_the_state_dict() -> None:
    model = models.sspnet_cifar(blocks=1)
    torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor(models.CIFAR_MEAN))
    torch.testing.assert_close(model.normalize.std.flatten(), torch.tensor(models.CIFAR_STD))
    assert not [key for key in model.state_dict() if key.startswith("normalize")]
    x = torch.rand(2, 3, 5, 5)
    mean = torch.tensor(models.CIFAR_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(models.CIFAR_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(model.normalize(x), (x - mean) / std)
    assert model.double().normalize.mean.dtype == torch.float64
    grey = models.sspnet_cifar(blocks=1, in_channels=1)
    assert grey.normalize.mean.item() == grey.normalize.std.item() == 0.5
    own = models.sspnet_mnist(blocks=1, mean=(0.25,), std=(0.125,))
    assert (own.normalize.mean.item(), own.normalize.std.item()) == (0.25, 0.125)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.sspnet_cifar("ssp99"), r"'ssp99'.*known: .*ssp22.*adaptive"),
        (lambda: models.sspnet_cifar(("ssp22", "nope", "euler")), "'nope'"),
        (lambda: models.sspnet_cifar(("ssp22", "euler")), "3 names, one per group, got 2"),
        (lambda: models.sspnet_tiny_imagenet(("ssp22",) * 3), "4 names"),
        (lambda: models.sspnet_cifar(norm="layer"), r"'layer'.*batch, group, instance"),
        (lambda: models.sspnet_mnist(norm="b"), r"norm 'b'"),
        (lambda: models.sspnet_cifar(blocks=0), "blocks must be a positive integer, got 0"),
        (lambda: models.sspnet_cifar(width=1.5), "width"),
        (lambda: models.sspnet_cifar(mean=(0.5,)), "mean .*3"),
        (lambda: models.sspnet_cifar(std=(0.5, 0.5, 0.0)), "std must be positive"),
        (lambda: models.wide_sspnet(27), "6 n"),
        (lambda: models.wide_sspnet(10), "6 n"),
        (lambda: models.wide_sspnet(28, 0), "widen_factor"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
