"""The settings of a training run."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import models
from ..data import AUGMENTATIONS, FOLDER_PREFIX
from ..nn import NORMS
from .ascent import BN_MODES
from .averaging import AVERAGES, EMA, SWA
from .defaults import data_defaults
from .devices import checked_device
from .methods import FREE, METHODS, own_settings
from .networks import NETWORKS
from .precision import PRECISIONS
from .schedules import MULTISTEP, SCHEDULES, default_milestones

# Where a run is continued or evaluated may differ from where it began; all other settings are its own.
PLACE = ("data_dir", "download", "device", "backend", "out")
_COUNTS = (
    *("blocks", "width", "steps", "epochs", "batch_size", "limit", "image_size"),
    *("replays", "accumulate", "save_every"),
)
_SIZES = ("eps", "step_size", "momentum", "weight_decay", "alpha", "beta", "noise")


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
        method: of `METHODS`: "none" (clean training), "pgd", "trades", "mart", "fgsm-rs", "n-fgsm"
            or "free".
        eps, step_size, steps: the l-infinity PGD attack, in units of pixels in [0, 1], of training
            (pgd, trades, mart) and of validation (all but "none").
        alpha: step of the methods that take one step (None: 1.25 eps with fgsm-rs, else eps).
        beta: weight of the divergence (None: 6 with trades, 5 with mart).
        noise: radius of n-fgsm's noise, in units of eps (None: 2).
        replays: how many times in a row free trains on a batch (None: 8).
        label_smoothing: of the cross-entropy that is trained on.
        bn_mode: mode of the network in the training attack, "eval" or "train".
        early_stop: with pgd, attack no sample further than to its misclassification.
        graph: run the training attack as a CUDA graph.
        epochs, lr, momentum, weight_decay: SGD with Nesterov momentum; lr is the largest learning
            rate of the schedule.
        batch_size: images per step of the optimizer, of all processes together.
        accumulate: in how many parts, one after another, a process takes its share of a batch.
        schedule: "cosine", "onecycle" or "multistep", stepped every batch.
        milestones: with "multistep", the epochs after which the rate falls to a tenth (None: after
            40, 70 and 90% of them).
        average: "none", or the average of weights that is validated and kept: "ema" (exponential,
            `ema_decay` a step) or "swa" (equal weights of all epochs from `swa_start` on; None:
            from three quarters of them on).
        amp: "none", "bf16" or "fp16": autocast in training. Validation is in full precision.
        channels_last: lay images and weights out channels last.
        compile: compile what surrounds the stacks of blocks with torch.compile.
        sync_bn: batch statistics over all processes, not over each one's share.
        save_every: save last.pt every so many steps too (None: at the end of epochs).
        tensorboard: write the scalars of each epoch for TensorBoard into the run folder.
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
    alpha: float | None = None
    beta: float | None = None
    noise: float | None = None
    replays: int | None = None
    label_smoothing: float = 0.0
    bn_mode: str = "eval"
    early_stop: bool = False
    graph: bool = False
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] | None = None
    average: str = "none"
    ema_decay: float | None = None
    swa_start: int | None = None
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    save_every: int | None = None
    tensorboard: bool = False
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
        filled = replace(filled, **own_settings(filled), **filled._schedule_settings())
        filled._check_numbers()
        filled._check_place()
        return filled

    def _schedule_settings(self) -> dict[str, Any]:
        """Milestones and averaging, where they are left open.

        Raises:
            ValueError: one of them was given where there is no use for it.
        """
        found = {}
        for name, needs, chosen, default in (
            ("milestones", MULTISTEP, self.schedule, default_milestones(self.epochs)),
            ("ema_decay", EMA, self.average, 0.999),
            ("swa_start", SWA, self.average, 3 * self.epochs // 4 + 1),
        ):
            if getattr(self, name) is None:
                found |= {name: default} if needs == chosen else {}
            elif needs != chosen:
                raise ValueError(f"{name} must go with {needs!r}, got {chosen!r}")
        return found

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
            ("bn_mode", BN_MODES),
            ("average", AVERAGES),
            ("amp", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        models.resolve_scheme(self.model, NETWORKS[self.network].groups)

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        for name, epochs in (("milestones", self.milestones), ("swa_start", (self.swa_start,))):
            for epoch in epochs or ():
                if epoch is not None and not 1 <= epoch <= self.epochs:
                    raise ValueError(f"{name} must be within the {self.epochs} epochs, got {epoch}")

    def _check_place(self) -> None:
        on_cpu = self.device.startswith("cpu")
        if self.graph and on_cpu:
            raise ValueError(f"graph must go with a cuda device, got {self.device!r}")
        if self.graph and self.early_stop:
            raise ValueError("early_stop must go without graph")
        if self.early_stop and self.bn_mode != "eval":
            raise ValueError(f"early_stop must go with bn_mode 'eval', got {self.bn_mode!r}")
        if self.method == FREE and self.accumulate > 1:
            raise ValueError(f"accumulate must be 1 with method 'free', got {self.accumulate}")
        if self.channels_last and on_cpu and self.network != "mnist" and self.width < 8:
            # torch 2.13's backward of a 1x1 convolution with stride 2 and fewer than 8 input
            # channels corrupts memory in this layout.
            raise ValueError(
                f"width must be at least 8 with channels_last on a CPU, got {self.width}"
            )

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
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        foreign = sorted(set(values) - {field.name for field in fields(cls)})
        if foreign:
            raise ValueError(f"not settings of a training run: {', '.join(foreign)}")
        return cls(**values)
