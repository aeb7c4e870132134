"""What a training run is made of: its settings, their defaults per data set, its network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from .._backends import use_backend
from ..data import AUGMENTATIONS, FOLDER_PREFIX, ImageSplits
from ..nn import NORMS

METHODS = ("none", "pgd")
SCHEDULES = ("cosine", "onecycle")


# Where a run is continued or evaluated may differ from where it began; all other settings are its own.
PLACE = ("data_dir", "download", "device", "backend", "out")


@dataclass(frozen=True)
class DataDefaults:
    """Settings that follow from the data set where the caller leaves them open.

    Attributes:
        network: key of `NETWORKS`.
        blocks, width: size of the network.
        eps, step_size, steps: the l-infinity training attack, in units of pixels in [0, 1].
        augment: of `ssp_fused.data.AUGMENTATIONS`.
        side: height and width of the images, unless the caller has them resized.
    """

    network: str
    blocks: int
    width: int
    eps: float
    step_size: float
    steps: int
    augment: str
    side: int


def _coloured(network: str, eps: int, step_size: int, steps: int, side: int) -> DataDefaults:
    return DataDefaults(network, 6, 16, eps / 255, step_size / 255, steps, "crop-flip", side)


# eps and step size are the published ones of MNIST, Fashion-MNIST, CIFAR-10 and Tiny ImageNet.
DEFAULTS = {
    "digits": DataDefaults("cifar", 2, 16, 0.15, 0.04, 7, "none", 8),
    "mnist": DataDefaults("mnist", 3, 64, 0.3, 0.05, 7, "none", 28),
    "fashion-mnist": DataDefaults("mnist", 3, 64, 0.1, 0.02, 7, "none", 28),
    "cifar10": _coloured("cifar", 8, 2, 7, side=32),
    "cifar100": _coloured("cifar", 8, 2, 7, side=32),
    "tiny-imagenet": _coloured("tiny_imagenet", 4, 1, 5, side=64),
}
_FOLDER_DEFAULTS = _coloured("cifar", 8, 2, 7, side=32)


def data_defaults(data: str) -> DataDefaults:
    """The defaults of a data set, by its name or as "folder:PATH".

    Raises:
        ValueError: an unknown name.
    """
    if data.startswith(FOLDER_PREFIX):
        return _FOLDER_DEFAULTS
    if data not in DEFAULTS:
        known = ", ".join((*DEFAULTS, f"{FOLDER_PREFIX}PATH"))
        raise ValueError(f"unknown data set {data!r}; known: {known}")
    return DEFAULTS[data]


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


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; those left None take the data set's default in `resolved`.

    Attributes:
        data: name of the data set, or "folder:PATH"; `data_dir` its folder (None: where it is
            looked for); `download` whether to fetch it; `image_size` the side that images are
            brought to (None: as they are).
        augment: of `ssp_fused.data.AUGMENTATIONS`, for the training images.
        network: kind of network, one of "cifar", "mnist" and "tiny_imagenet".
        model: a published name, a scheme, or comma-separated schemes, one per group.
        blocks, width, norm: of the network.
        method: "none" (clean training) or "pgd" (PGD adversarial training).
        eps, step_size, steps: the training attack (l-infinity), in units of pixels in [0, 1].
        epochs, batch_size, lr, momentum, weight_decay: SGD with Nesterov momentum; lr is the
            largest learning rate of the schedule.
        schedule: "cosine" or "onecycle", stepped every batch.
        seed: of initialization, data order and attacks.
        device: where to compute (None: a GPU if there is one, else the CPU).
        backend: which implementation of the layers (None: the one chosen by `use_backend` or the
            environment).
        limit: train on the first so many images only (None: all).
        out: the run folder (None: one under "runs" named after data, model, method and seed).
    """

    data: str = "digits"
    data_dir: str | None = None
    download: bool = False
    image_size: int | None = None
    augment: str | None = None
    network: str | None = None
    model: str = "ssp2"
    blocks: int | None = None
    width: int | None = None
    norm: str = "batch"
    method: str = "pgd"
    eps: float | None = None
    step_size: float | None = None
    steps: int | None = None
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    seed: int = 0
    device: str | None = None
    backend: str | None = None
    limit: int | None = None
    out: str | None = None

    def resolved(self) -> TrainConfig:
        """The same settings with nothing left open, checked.

        Raises:
            ValueError: an unknown name or a number out of range; the message names it.
        """
        defaults = data_defaults(self.data)
        left_open = ("network", "blocks", "width", "eps", "step_size", "steps", "augment")
        filled = replace(
            self,
            **{name: getattr(defaults, name) for name in left_open if getattr(self, name) is None},
            device=checked_device(self.device),
            out=self.out or f"runs/{self._run_name()}",
        )
        filled._check_names()
        filled._check_numbers()
        return filled

    def _run_name(self) -> str:
        """What tells runs apart, as a file name."""
        data = self.data
        if data.startswith(FOLDER_PREFIX):
            data = f"folder-{Path(data.removeprefix(FOLDER_PREFIX)).resolve().name}"
        parts = (data, self.model.replace(" ", "").replace(",", "+"), self.method)
        return re.sub(r"[^\w.+-]", "_", f"{'-'.join(parts)}-seed{self.seed}", flags=re.ASCII)

    def _check_names(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("norm", NORMS),
            ("augment", AUGMENTATIONS),
            ("network", NETWORKS),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        models.resolve_scheme(self.model, NETWORKS[self.network].groups)

    def _check_numbers(self) -> None:
        for name in ("blocks", "width", "steps", "epochs", "batch_size", "limit", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("eps", "step_size", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def at(
        self,
        *,
        data_dir: str | None = None,
        device: str | None = None,
        backend: str | None = None,
    ) -> TrainConfig:
        """The same run in another place; what is None stays.

        Args:
            data_dir: folder of the data's files. Where the data is "folder:PATH", that folder
                itself, or one that holds a relative PATH.
            device: where to compute.
            backend: implementation of the layers.
        """
        given = {"data_dir": data_dir, "device": device, "backend": backend}
        moved = replace(self, **{key: value for key, value in given.items() if value is not None})
        if data_dir is None or not self.data.startswith(FOLDER_PREFIX):
            return moved
        path = Path(self.data.removeprefix(FOLDER_PREFIX))
        if not path.is_absolute() and Path(data_dir, path).is_dir():
            return moved
        return replace(moved, data=f"{FOLDER_PREFIX}{data_dir}", data_dir=None)

    def differences(self, other: TrainConfig) -> list[str]:
        """The settings in which two runs differ, whatever their places are."""
        mine, theirs = self.to_dict(), other.to_dict()
        for values in (mine, theirs):
            if values["data"].startswith(FOLDER_PREFIX):
                values["data"] = FOLDER_PREFIX
        return [name for name in mine if name not in PLACE and mine[name] != theirs[name]]

    def attack(self) -> dict[str, Any]:
        """The training attack as arguments of `pgd`."""
        return {"eps": self.eps, "step_size": self.step_size, "steps": self.steps}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key that is no setting.
        """
        foreign = sorted(set(values) - {field.name for field in fields(cls)})
        if foreign:
            raise ValueError(f"not settings of a training run: {', '.join(foreign)}")
        return cls(**values)


def checked_device(name: str | None) -> str:
    """The name of a usable device; None means a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device of torch") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not here, torch sees {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    return name


def chosen_backend(name: str | None) -> AbstractContextManager[object]:
    """A context with the named implementation of the layers; None leaves the choice alone."""
    return nullcontext() if name is None else use_backend(name)


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
