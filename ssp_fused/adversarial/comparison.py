"""The comparison of SSP networks with ResNets: its protocol, what of it is reduced, its cells.

Source of the protocol: B. Kim et al., "Robust Neural Networks Inspired by Strong Stability
Preserving Runge-Kutta Methods", ECCV 2020, and its code (github matbambbang/sspnet, commit 6c3ce52).
Differences: attacks start at random points, and the epoch to keep is chosen on validation images;
MNIST and Fashion-MNIST are trained with the optimizer and the normalization of CIFAR-10, where the
published scripts' defaults are Adam, batches of 64 and group normalization.

The training attack sees the network in training mode, as in that code. Stages of an SSP block share
running statistics, so that the network in eval mode is further from the one that is trained than a
ResNet's is; attacked in eval mode, it learns the gap in place of robustness.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import schemes
from ..data import FOLDER_PREFIX
from ..models import ADAPTIVE, PUBLISHED_SCHEMES, resolve_scheme
from .config import PLACE, TrainConfig
from .defaults import data_defaults
from .evaluation import EvaluationSettings
from .methods import METHODS
from .networks import NETWORKS
from .schedules import MULTISTEP

# The data set of each table.
TABLES = {"cifar10": "cifar10", "fmnist": "fashion-mnist", "mnist": "mnist"}
MODELS = tuple(PUBLISHED_SCHEMES)
COMPARED_METHODS = ("none", "pgd", "trades")
_RESNET = "res"
_OF_A_CELL = ("model", "method", "seed", "beta")
_IMAGES = ("test_images", "growth_images")


@dataclass(frozen=True)
class Network:
    """One of the networks compared.

    Attributes:
        model: published name.
        blocks: per group.
        evaluations: of F in a forward pass, subsampling blocks aside.
    """

    model: str
    blocks: int
    evaluations: int


@dataclass(frozen=True)
class Cell:
    """One network, trained by one method from one seed, and measured.

    Attributes:
        folder: of its run and its reports.
    """

    network: Network
    method: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """What is compared; the defaults are the protocol.

    Attributes:
        table: a key of `TABLES`.
        models: published names.
        methods: of training, a selection of `COMPARED_METHODS`.
        seeds: of training; each of them a run of every network and method.
        equal_evaluations: also ResNets with as many evaluations of F as the networks that
            evaluate it equally often in all groups.
        data: another source of the table's data, as "folder:PATH".
        data_dir, download: as of `TrainConfig`.
        blocks, width: of the networks (None: the published ones).
        steps: of the training attack (None: the published number).
        epochs: of training.
        limit: train on the first so many images only (None: all).
        test_images: how many of the first test images for clean accuracy and PGD-20 (None: all).
        autoattack_images: the same for AutoAttack; 0 leaves it out.
        growth_images: the same for perturbation growth.
        device, backend: as of `TrainConfig`.
        out: the folder of the results (None: runs/reproduce-TABLE).
    """

    table: str
    models: tuple[str, ...] = MODELS
    methods: tuple[str, ...] = COMPARED_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    equal_evaluations: bool = False
    data: str | None = None
    data_dir: str | None = None
    download: bool = False
    blocks: int | None = None
    width: int | None = None
    steps: int | None = None
    epochs: int = 200
    limit: int | None = None
    test_images: int | None = None
    autoattack_images: int | None = None
    growth_images: int | None = None
    device: str | None = None
    backend: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        """Check all of it, before hours of work.

        Raises:
            ValueError: a bad setting; the message names it.
        """
        if self.table not in TABLES:
            raise ValueError(f"unknown table {self.table!r}; known: {', '.join(TABLES)}")
        for name, known in (("models", MODELS), ("methods", COMPARED_METHODS), ("seeds", None)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more, each once, got {values}")
            foreign = [value for value in values if known is not None and value not in known]
            if foreign:
                raise ValueError(f"{name} must be of {', '.join(known)}, got {', '.join(foreign)}")
        if self.data is not None and not self.data.startswith(FOLDER_PREFIX):
            raise ValueError(f"data must be {FOLDER_PREFIX}PATH or left out, got {self.data!r}")
        for name in ("blocks", "width", "steps", *_IMAGES):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.autoattack_images is not None and self.autoattack_images < 0:
            raise ValueError(
                f"autoattack_images must not be negative, got {self.autoattack_images}"
            )
        for cell in self.cells():
            self.training(cell)

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.out or f"runs/reproduce-{self.table}")

    def networks(self) -> list[Network]:
        """The networks at equal parameters, then the ResNets at equal evaluations of F."""
        defaults = data_defaults(TABLES[self.table])
        blocks = self.blocks or defaults.blocks
        per_block = {
            model: _evaluations(model, NETWORKS[defaults.network].groups)
            for model in (_RESNET, *self.models)
        }
        found = [Network(model, blocks, blocks * sum(per_block[model])) for model in self.models]
        if self.equal_evaluations:
            groups = len(per_block[_RESNET])
            uniform = {each[0] for each in per_block.values() if len(set(each)) == 1} - {1}
            for times in sorted(uniform):
                found.append(Network(_RESNET, times * blocks, times * blocks * groups))
        return found

    def cells(self) -> Iterator[Cell]:
        """All cells, one seed after the other."""
        for seed in self.seeds:
            for method in self.methods:
                for network in self.networks():
                    name = f"{method}-{network.model}-{network.blocks}"
                    yield Cell(network, method, seed, self.folder / f"seed{seed}" / name)

    def training(self, cell: Cell) -> TrainConfig:
        """The settings of a cell's training run."""
        return TrainConfig(
            **self._shared(cell.method),
            model=cell.network.model,
            blocks=cell.network.blocks,
            seed=cell.seed,
            data_dir=self.data_dir,
            download=self.download,
            device=self.device,
            backend=self.backend,
            out=str(cell.folder),
        ).resolved()

    def evaluation(self, images: int | None) -> EvaluationSettings:
        """How networks are attacked, on the first `images` test images (None: all)."""
        return EvaluationSettings(
            data=self.data or TABLES[self.table],
            data_dir=self.data_dir,
            download=self.download,
            limit=images,
            device=self.device,
            backend=self.backend,
        )

    def settings(self) -> dict[str, Any]:
        """What all cells have in common and their place is no part of, as JSON types."""
        images = {name: getattr(self, name) for name in (*_IMAGES, "autoattack_images")}
        return {**self.training_settings(), **images}

    def training_settings(self) -> dict[str, Any]:
        """`settings` without the numbers of test images: what a folder's runs were trained with."""
        common = TrainConfig(
            **self._shared("pgd"), blocks=self.blocks or data_defaults(TABLES[self.table]).blocks
        ).resolved()
        training = {
            name: value
            for name, value in common.to_dict().items()
            if name not in (*PLACE, *_OF_A_CELL)
        }
        if training["data"].startswith(FOLDER_PREFIX):
            training["data"] = FOLDER_PREFIX
        return json.loads(json.dumps({"table": self.table, **training}))

    def reductions(self) -> dict[str, tuple[Any, Any]]:
        """The settings that are not the protocol's: by name, the value and the protocol's."""
        protocol = Comparison(self.table)
        selected = {
            name: (getattr(self, name), getattr(protocol, name)) for name in ("models", "methods")
        }
        return {
            **differences(self.settings(), protocol.settings()),
            **{name: pair for name, pair in selected.items() if set(pair[0]) != set(pair[1])},
        }

    def _shared(self, method: str) -> dict[str, Any]:
        """Arguments of all `TrainConfig`s of a method: the data set's, wherever that comes from."""
        name = TABLES[self.table]
        defaults = data_defaults(name)
        attacked = {"bn_mode": "train"} if "bn_mode" in METHODS[method].settings else {}
        return {
            **attacked,
            "method": method,
            "data": self.data or name,
            "network": defaults.network,
            "augment": defaults.augment,
            "width": self.width or defaults.width,
            "eps": defaults.eps,
            "step_size": defaults.step_size,
            "steps": self.steps or defaults.steps,
            "epochs": self.epochs,
            "limit": self.limit,
            "schedule": MULTISTEP,
        }


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two results of `Comparison.settings` differ: by name, both values."""
    pairs = {name: (mine.get(name), theirs.get(name)) for name in (*mine, *theirs)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _evaluations(model: str, groups: int) -> list[int]:
    """Evaluations of F in a block of each group."""
    return [
        2 if scheme == ADAPTIVE else schemes.get(scheme).stages
        for scheme in resolve_scheme(model, groups)
    ]
