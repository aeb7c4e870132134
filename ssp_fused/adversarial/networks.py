"""The networks that training runs make, and make again from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..data import ImageSplits

if TYPE_CHECKING:
    from .config import TrainConfig


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network that runs can train.

    Attributes:
        build: of `ssp_fused.models`.
        groups: number of groups of blocks, each of which can have its scheme.
        smallest: the least height and width of images that its subsampling leaves something of.
    """

    build: Callable[..., nn.Module]
    groups: int
    smallest: int


NETWORKS = {
    "cifar": NetworkKind(models.sspnet_cifar, groups=3, smallest=4),
    "mnist": NetworkKind(models.sspnet_mnist, groups=1, smallest=10),
    "tiny_imagenet": NetworkKind(models.sspnet_tiny_imagenet, groups=4, smallest=8),
}


def network_spec(config: TrainConfig, splits: ImageSplits) -> dict[str, Any]:
    """What `build_network` needs to make the run's network again, without its data; JSON types.

    Raises:
        ValueError: the images are too small for the network.
    """
    kind = NETWORKS[config.network]
    channels, height, width = splits.image_shape
    if min(height, width) < kind.smallest:
        raise ValueError(
            f"network {config.network!r} takes images of at least {kind.smallest}x{kind.smallest} "
            f"pixels, those of {config.data} are {height}x{width}"
        )
    return {
        "network": config.network,
        "arguments": {
            "scheme": list(models.resolve_scheme(config.model, kind.groups)),
            "blocks": config.blocks,
            "norm": config.norm,
            "width": config.width,
            "num_classes": splits.num_classes,
            "in_channels": channels,
            "mean": list(splits.mean),
            "std": list(splits.std),
        },
    }


def build_network(spec: dict[str, Any]) -> nn.Module:
    """The network of a `network_spec`.

    Raises:
        ValueError: an unknown network.
        TypeError: arguments that it does not take.
    """
    name = spec.get("network")
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    network = NETWORKS[name].build(**spec.get("arguments", {}))
    if name == "mnist":
        # Faster on CPUs. Not for the others: on CPUs, torch 2.13's backward of a 1x1 convolution
        # with stride 2 and fewer than 8 input channels corrupts memory in this layout.
        network = network.to(memory_format=torch.channels_last)
    return network
