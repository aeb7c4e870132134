"""What a training run is made of: its settings, their defaults per data set, its network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from .. import models
from ..data import ImageSplits
from ..nn import NORMS

METHODS = ("none", "pgd")
SCHEDULES = ("cosine", "onecycle")


@dataclass(frozen=True)
class DataDefaults:
    """Settings that follow from the data set where the caller leaves them open.

    Attributes:
        network: key of `NETWORKS`.
        blocks, width: size of the network.
        eps, step_size, steps: the l-infinity training attack, in units of pixels in [0, 1].
    """

    network: str
    blocks: int
    width: int
    eps: float
    step_size: float
    steps: int


# MNIST's and Fashion-MNIST's eps and step size are the published ones.
DEFAULTS = {
    "digits": DataDefaults("cifar", blocks=2, width=16, eps=0.15, step_size=0.04, steps=7),
    "mnist": DataDefaults("mnist", blocks=3, width=64, eps=0.3, step_size=0.05, steps=7),
    "fashion-mnist": DataDefaults("mnist", blocks=3, width=64, eps=0.1, step_size=0.02, steps=7),
}

# Builder, and number of groups.
NETWORKS = {"cifar": (models.sspnet_cifar, 3), "mnist": (models.sspnet_mnist, 1)}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; those left None take the data set's default in `resolved`.

    Attributes:
        data: name of the data set, and `data_dir` its folder (None: where it is looked for).
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
        if self.data not in DEFAULTS:
            raise ValueError(f"unknown data set {self.data!r}; known: {', '.join(DEFAULTS)}")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
            ("norm", self.norm, NORMS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        defaults = DEFAULTS[self.data]
        filled = replace(
            self,
            **{
                name: getattr(defaults, name)
                for name in ("blocks", "width", "eps", "step_size", "steps")
                if getattr(self, name) is None
            },
        )
        model_name = self.model.replace(",", "+").replace(" ", "")
        filled = replace(
            filled,
            device=checked_device(self.device),
            out=self.out or f"runs/{self.data}-{model_name}-{self.method}-seed{self.seed}",
        )
        models.resolve_scheme(self.model, NETWORKS[defaults.network][1])
        for name in ("blocks", "width", "steps", "epochs", "batch_size", "limit"):
            value = getattr(filled, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("eps", "step_size", "momentum", "weight_decay"):
            if not 0 <= getattr(filled, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(filled, name)}")
        if not 0 < filled.lr < math.inf:
            raise ValueError(f"lr must be positive, got {filled.lr}")
        return filled

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


def network_spec(config: TrainConfig, splits: ImageSplits) -> dict[str, Any]:
    """What `build_network` needs to make the run's network again, without its data; JSON types."""
    name = DEFAULTS[config.data].network
    return {
        "network": name,
        "arguments": {
            "scheme": list(models.resolve_scheme(config.model, NETWORKS[name][1])),
            "blocks": config.blocks,
            "norm": config.norm,
            "width": config.width,
            "num_classes": splits.num_classes,
            "in_channels": splits.image_shape[0],
            "mean": list(splits.mean),
            "std": list(splits.std),
        },
    }


def build_network(spec: dict[str, Any]) -> nn.Module:
    """The network of a `network_spec`.

    Raises:
        ValueError: an unknown network, or arguments it does not take.
    """
    if spec["network"] not in NETWORKS:
        raise ValueError(f"unknown network {spec['network']!r}; known: {', '.join(NETWORKS)}")
    network = NETWORKS[spec["network"]][0](**spec["arguments"])
    if spec["network"] == "mnist":
        # Faster on CPUs. Not for the others: on CPUs, torch 2.13's backward of a 1x1 convolution
        # with stride 2 and fewer than 8 input channels corrupts memory in this layout.
        network = network.to(memory_format=torch.channels_last)
    return network
