"""State dicts of the published networks: loaded into ours, and written from ours.

The published code is github matbambbang/sspnet, commit 6c3ce52, by the authors of Kim et al., "Robust Neural Networks
Inspired by Strong Stability Preserving Runge-Kutta Methods", ECCV 2020. Its stems, heads and groups have the names ours
have; its blocks have not (`_BRANCH`, `_FORMS`), and they repeat the branch's tensors under a second name, an alias.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _checks, schemes
from ..nn import NORMS, AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack
from .names import ADAPTIVE, PUBLISHED_SCHEMES, resolve_scheme
from .networks import (
    SSPNet,
    SSPNetMNIST,
    sspnet_cifar,
    sspnet_mnist,
    sspnet_tiny_imagenet,
)

# Mean and std of the published loaders, for pixels in [0, 1]. The third of CIFAR-10's means is a slip (the data's is
# 0.4465), which the published checkpoints were trained with.
PUBLISHED_NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.2265), (0.2023, 0.1994, 0.2010)),
    "mnist": ((0.0,), (1.0,)),
    "fmnist": ((0.0,), (1.0,)),
    "tinyimagenet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

_Block = SSPBlock | AdaptiveSSPBlock | PreActDownsample


@dataclass(frozen=True)
class _Layout:
    """A published network: our builder, its groups of blocks, and the weights from which its sizes are read."""

    build: Callable[..., nn.Module]
    groups: tuple[str, ...]
    first: str
    last: str


_MNIST = _Layout(sspnet_mnist, ("blocks",), "downsample.0.weight", "linear.4.weight")
_LAYOUTS = {
    "cifar10": _Layout(sspnet_cifar, ("block1", "block2", "block3"), "conv.weight", "fc.weight"),
    "mnist": _MNIST,
    "fmnist": _MNIST,
    "tinyimagenet": _Layout(
        sspnet_tiny_imagenet,
        ("block1", "block2", "block3", "block4"),
        "conv.weight",
        "fc.weight",
    ),
}

# Where the published block of a scheme has its branch, and the name of the Sequential that repeats it.
_FORMS = {
    "euler": ("", "residual"),
    "sspnet-midrk2": ("", "residual"),
    "ssp22": ("block.", "residual"),
    "ssp33": ("block.", "residual"),
    ADAPTIVE: ("", "f"),
}
# Our name of a branch's module, the published one, and its place in that Sequential. In the published order.
_BRANCH = (
    ("norm1", "n1", "0"),
    ("downsample", "downsample", None),
    ("conv1", "conv1", "2"),
    ("norm2", "n2", "3"),
    ("conv2", "conv2", "5"),
)
_AFFINE = ["weight", "bias"]
_BATCH_NORM = [*_AFFINE, "running_mean", "running_var", "num_batches_tracked"]


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's children by name, groups opened up into their blocks."""
    for name, child in network.named_children():
        if isinstance(child, SSPStack):
            yield from ((f"{name}.{index}", block) for index, block in child.named_children())
        else:
            yield name, child


def _scheme(block: _Block) -> str:
    if isinstance(block, SSPBlock):
        return block.scheme.name
    return ADAPTIVE if isinstance(block, AdaptiveSSPBlock) else "euler"


def _block_keys(name: str, block: _Block) -> dict[str, str]:
    inside, repeated = _FORMS[_scheme(block)]
    theirs = f"{name}.{inside}"
    keys = {f"{theirs}{scalar}": f"{name}.{scalar}" for scalar in block._parameters}
    aliases = {}
    for ours, published, place in _BRANCH:
        if not hasattr(block, ours):
            continue
        for tensor in block.get_submodule(ours).state_dict():
            keys[f"{theirs}{published}.{tensor}"] = f"{name}.{ours}.{tensor}"
            if place is not None:
                aliases[f"{theirs}{repeated}.{place}.{tensor}"] = f"{name}.{ours}.{tensor}"
    return keys | aliases


def _published_keys(network: nn.Module) -> dict[str, str]:
    """The published key of every tensor, aliases included and in the published order, and ours."""
    keys: dict[str, str] = {}
    for name, part in _parts(network):
        if isinstance(part, _Block):
            keys |= _block_keys(name, part)
        else:
            keys |= {f"{name}.{tensor}": f"{name}.{tensor}" for tensor in part.state_dict()}
    return keys


def from_sspnet(
    state_dict: Mapping[str, Tensor],
    *,
    dataset: str = "cifar10",
    model: str | Sequence[str] = "ssp2",
    norm: str | None = None,
    num_groups: int | None = None,
) -> nn.Module:
    """The network of a state_dict of the published code.

    Number of blocks, width, channels of the images, number of classes, and batch or group norm are read off the
    tensors' names and shapes. They cannot tell "res" from "midrk2", nor "ssp2" from "ssp3", nor how many groups a
    group norm has: these are as the arguments say.

    The network is bare, as the published ones are: it takes images already normalized. To have one that takes images
    in [0, 1]: ``net.normalize = Normalize(*PUBLISHED_NORMALIZATION[dataset])``.

    Args:
        state_dict: Of the published network, or of its DataParallel wrapper ("module." before every key); in a
            published checkpoint file it is the entry "state_dict". The branch's tensors may be repeated under their
            aliases (``residual.*``, ``f.*``) or not.
        dataset: "cifar10", "mnist", "fmnist" or "tinyimagenet".
        model: "res", "midrk2", "ssp2", "ssp3" or "ark", or one of them per group of blocks. "ark" alone is the
            published mixture, adaptive blocks in the first group, then euler, then ssp22; in a sequence it is a
            group of adaptive blocks.
        norm: "batch", "group" or "instance" (the published "b", "g", "i"); None is "batch" or "group", as read.
        num_groups: Groups of a group norm; None is the published "g", min(32, channels), and 1 the published "l".

    Returns:
        A module, in training mode, from normalized images ``[N, in_channels, H, W]`` to logits ``[N, classes]``. Its
        tensors are copies with the dtypes and on the devices of those given; its parameters require gradients.

    Raises:
        TypeError: `state_dict` is no mapping from names to tensors, a tensor has no suitable dtype, or `model` is no
            name or sequence.
        ValueError: An unknown dataset, model or norm; a norm that contradicts the tensors; keys missing or foreign; a
            tensor of another shape than the network's; an alias that differs from the tensor it repeats.
    """
    state = _named_tensors(state_dict)
    network = _blank(state, dataset, model, norm, num_groups)
    keys = _published_keys(network)
    originals: dict[str, str] = {}
    for published, ours in keys.items():
        originals.setdefault(ours, published)
    _check_keys(state, keys, originals, f"the {dataset} network of model {model!r}")
    for ours, expected in network.state_dict().items():
        _check_tensor(originals[ours], state[originals[ours]], expected)
    for published in state:
        if published != originals[keys[published]]:
            _check_alias(published, originals[keys[published]], state)
    values = {ours: state[key].detach().clone() for ours, key in originals.items()}
    network.load_state_dict(values, assign=True)
    return network


def _named_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the bare network."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict's keys must be strings, got {key!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(value).__name__}")
    wrapped = all(key.startswith("module.") for key in state_dict)
    return {key.removeprefix("module.") if wrapped else key: v for key, v in state_dict.items()}


def _blank(
    state: dict[str, Tensor],
    dataset: str,
    model: str | Sequence[str],
    norm: str | None,
    num_groups: int | None,
) -> nn.Module:
    """The bare network that the tensors should fit, without memory or values."""
    if dataset not in _LAYOUTS:
        raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(_LAYOUTS)}")
    layout = _LAYOUTS[dataset]
    names = _group_schemes(model, len(layout.groups))
    norm = _norm(state, norm)
    sizes = _sizes(state, layout)
    widths = [sizes["width"] << index for index in range(len(names))] if "width" in sizes else []
    _check_num_groups(num_groups, norm, widths)
    with torch.device("meta"):
        network = layout.build(
            names, _blocks(state, layout), norm=norm, num_groups=num_groups, **sizes
        )
    network.normalize = nn.Identity()
    return network


def _group_schemes(model: str | Sequence[str], groups: int) -> tuple[str, ...]:
    """Our scheme of each group."""
    if not isinstance(model, Sequence):
        raise TypeError(f"model must be a name or a sequence of names, got {type(model).__name__}")
    names = (model,) if isinstance(model, str) else tuple(model)
    for name in names:
        if not isinstance(name, str) or name not in PUBLISHED_SCHEMES:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(PUBLISHED_SCHEMES)}")
    if isinstance(model, str):
        return resolve_scheme(model, groups)
    if len(names) != groups:
        raise ValueError(
            f"model must be one name or {groups} names, one per group, got {len(names)}: {names}"
        )
    return tuple(PUBLISHED_SCHEMES[name] for name in names)


def _norm(state: dict[str, Tensor], norm: str | None) -> str:
    tracked = any(key.endswith(".running_mean") for key in state)
    if norm is None:
        return "batch" if tracked else "group"
    if norm in NORMS and (norm == "batch") != tracked:
        found = "running statistics" if tracked else "no running statistics"
        raise ValueError(f"norm must fit the state_dict, which holds {found}; got {norm!r}")
    return norm


def _check_num_groups(num_groups: int | None, norm: str, widths: Sequence[int]) -> None:
    if num_groups is not None and (not isinstance(num_groups, int) or num_groups < 1):
        raise ValueError(f"num_groups must be a positive integer, got {num_groups!r}")
    for channels in widths if norm == "group" else ():
        groups = min(32, channels) if num_groups is None else num_groups
        if channels % groups:
            raise ValueError(f"num_groups must divide the {channels} channels, got {groups}")


def _sizes(state: dict[str, Tensor], layout: _Layout) -> dict[str, int]:
    """Sizes by the builder's names.

    Those of a missing or misshapen tensor are left to the builder's defaults, and it is reported with the others.
    """
    first, last = state.get(layout.first), state.get(layout.last)
    sizes = {}
    if first is not None and first.dim() == 4 and first.numel():
        sizes |= {"width": first.shape[0], "in_channels": first.shape[1]}
    if last is not None and last.dim() == 2 and last.numel():
        sizes |= {"num_classes": last.shape[0]}
    return sizes


def _blocks(state: dict[str, Tensor], layout: _Layout) -> int:
    """Blocks per group: those of the largest group, so that what another lacks is missing."""
    indices = (
        {key.split(".")[1] for key in state if key.startswith(f"{group}.")}
        for group in layout.groups
    )
    return max(1, *map(len, indices))


def _check_keys(
    state: dict[str, Tensor], keys: dict[str, str], originals: dict[str, str], network: str
) -> None:
    """Every tensor is there under its own name, aliases are free, and there is nothing else."""
    missing = [key for key in originals.values() if key not in state]
    foreign = [key for key in state if key not in keys]
    if missing or foreign:
        found = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("foreign", foreign))
            if names
        ]
        raise ValueError(f"state_dict must hold the keys of {network}, got {' and '.join(found)}")


def _check_tensor(key: str, value: Tensor, expected: Tensor) -> None:
    if expected.is_floating_point():
        _checks.tensor(f"state_dict[{key!r}]", value)
    elif value.dtype != expected.dtype:
        raise TypeError(f"state_dict[{key!r}] must be {expected.dtype}, got {value.dtype}")
    if value.shape != expected.shape:
        raise ValueError(
            f"state_dict[{key!r}] must have shape {tuple(expected.shape)}, got {tuple(value.shape)}"
        )


def _check_alias(alias: str, original: str, state: dict[str, Tensor]) -> None:
    one, other = state[alias], state[original]
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    # A diverged run's NaN is equal to itself here.
    if not (same and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)):
        raise ValueError(
            f"state_dict[{alias!r}] must equal state_dict[{original!r}], whose alias it is"
        )


def to_sspnet(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the published network that computes the same, which it loads strictly.

    Not part of it are the network's normalization (the published networks take images already normalized) and how
    many groups a group norm has.

    Args:
        module: A network of `sspnet_cifar`, `sspnet_tiny_imagenet`, `sspnet_mnist` or `from_sspnet`.

    Returns:
        An OrderedDict in the published module's order, the branches' tensors repeated under their aliases. Like those
        of ``state_dict()``, the tensors are detached and share their storage with the module's.

    Raises:
        TypeError: `module` is another network.
        ValueError: A block has no published counterpart: by its scheme, its activation, its step size, or convolutions
            without bias.
    """
    if not isinstance(module, SSPNet | SSPNetMNIST):
        raise TypeError(f"module must be an SSPNet or SSPNetMNIST, got {type(module).__name__}")
    for name, part in _parts(module):
        if "." in name or isinstance(part, _Block):
            reason = _unlike_published(part)
            if reason:
                raise ValueError(f"module.{name} must be as published, but {reason}")
    state = module.state_dict()
    return OrderedDict((key, state[ours]) for key, ours in _published_keys(module).items())


def _unlike_published(block: nn.Module) -> str | None:
    """Why the published code has no block like this one; None if it has."""
    if not isinstance(block, _Block):
        return f"it is of type {type(block).__name__}"
    if isinstance(block, SSPBlock) and not _scheme_is_published(block):
        published = ", ".join(scheme for scheme in _FORMS if scheme != ADAPTIVE)
        return f"its scheme is {block.scheme.name!r}, not one of {published}"
    if block.activation != "relu":
        return f"its activation is {block.activation!r}, not 'relu'"
    if getattr(block, "step_size", 1) != 1:
        return f"its step_size is {block.step_size}, not 1"
    for part in ("norm1", "conv1", "norm2", "conv2"):
        tensors = list(block.get_submodule(part).state_dict())
        if tensors not in (_AFFINE, _BATCH_NORM):
            return f"{part} holds {', '.join(tensors) or 'nothing'}, not weight and bias"
    return None


def _scheme_is_published(block: SSPBlock) -> bool:
    name = block.scheme.name
    return name in _FORMS and block.scheme == schemes.get(name)
