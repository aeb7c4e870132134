"""A checkpoint on test images under named attacks, and the report of it."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from .._backends import select
from .._version import __version__
from ..functional import BLOCK_OPS
from .checkpoint import checkpoint_path, load_checkpoint
from .config import TrainConfig
from .devices import checked_device, chosen_backend
from .distributed import Ranks
from .libraries import LibraryAttack
from .masking import MASKING_IMAGES, MaskingChecks
from .named import named_attacks
from .networks import NETWORKS
from .outcomes import dealt, summary
from .precision import full_float32
from .run import EVALUATION_BATCH
from .training import CLEAN, WORST, Attack, outcomes
from .transfer import REFERENCE, transfer_outcomes, transfer_report

DEFAULT_ATTACKS = ("fgsm", "pgd-20")


@dataclass(frozen=True)
class EvaluationSettings:
    """On which test images, and within which radius, a checkpoint is attacked.

    Attributes:
        last: of a run folder the last state, not the one that was best on validation images.
        data: a data set other than the run's, for a network that fits it.
        data_dir: folder of the data's files; where the data is a folder of images, that folder.
        download: fetch the data where it is missing.
        image_size: side that images are brought to; the run's if None.
        norm: "linf" or "l2".
        eps, step_size: of the attacks, in units of pixels in [0, 1]; the run's if None. With "l2"
            there is no default of eps; that of step_size is the run's share of eps.
        batch_size: images at once.
        seed: of the attacks' random numbers; batch i is attacked with seed + i.
        limit: the first so many images only.
        device: a GPU if None and there is one, else the CPU.
        backend: implementation of the layers; the run's if None.
    """

    last: bool = False
    data: str | None = None
    data_dir: str | None = None
    download: bool = False
    image_size: int | None = None
    norm: str = "linf"
    eps: float | None = None
    step_size: float | None = None
    batch_size: int = EVALUATION_BATCH
    seed: int = 0
    limit: int | None = None
    device: str | None = None
    backend: str | None = None


class EvaluatedNetwork:
    """A checkpoint's network, and the test images it is attacked on.

    Attributes:
        model: in eval mode, on its device.
        config: the settings it was trained with.
        num_classes: that it tells apart.
        backend: implementation of the layers to choose (None: leave the choice alone).

    Args:
        path: a run folder or a checkpoint.
        settings: what is None in them comes from the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint; the data is missing.
        ValueError: a bad setting; a damaged file; images that do not fit the network.
    """

    def __init__(self, path: str | Path, settings: EvaluationSettings) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.settings = settings
        self.device = checked_device(settings.device)
        self.path = checkpoint_path(path, last=settings.last)
        self.model: nn.Module
        self.model, self.config, self._state = load_checkpoint(self.path, self.device)
        self.num_classes: int = self._state["network"]["arguments"]["num_classes"]
        self.backend = settings.backend or self.config.backend
        self.eps, self.step_size = _radius(settings, self.config)
        self.data, splits = _test_data(settings, self.config)
        _check_fit(self._state["network"], self.data, splits)
        test = splits.test if settings.limit is None else splits.test.take(settings.limit)
        self._test = test.to(self.device)

    def batches(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and labels, or the first `count` of them."""
        test = self._test if count is None else self._test.take(count)
        return test.batches(self.settings.batch_size)

    def attacks(self, names: Sequence[str], batch: int = 0) -> dict[str, Attack]:
        """Named attacks with their settings, on the batch of that index (and those after it)."""
        return named_attacks(
            names,
            eps=self.eps,
            step_size=self.step_size,
            norm=self.settings.norm,
            seed=self.settings.seed + batch,
            device=self.device,
        )

    def provenance(self) -> dict[str, Any]:
        """What was measured, on what and with what; JSON types.

        "settings" are those of an `EvaluationSettings` that measures the same on "checkpoint".
        """
        backend = self.serving_backend()
        settings = replace(
            self.settings,
            last=False,
            eps=self.eps,
            step_size=self.step_size,
            device=self.device,
            backend=backend,
        )
        return {
            "checkpoint": str(self.path),
            "checkpoint_sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "model": self.config.model,
            "epoch": self._state["epoch"],
            "batches_after_epoch": _batches_after_epoch(self._state),
            "data": self.data,
            "data_sha256": _digest(self._test),
            "images": len(self._test),
            "norm": self.settings.norm,
            "eps": self.eps,
            "step_size": self.step_size,
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "device": _device_name(self.device),
            "backend": backend,
            "threads": torch.get_num_threads(),
            "versions": {
                "ssp_fused": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "settings": asdict(settings),
        }

    def serving_backend(self) -> str:
        """Name of the implementation that serves the model's layers."""
        specimen = next(self.model.parameters())
        with chosen_backend(self.backend):
            return select(BLOCK_OPS, (specimen,)).name


def evaluate_checkpoint(
    path: str | Path,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    settings: EvaluationSettings | None = None,
    *,
    transfer: bool = False,
    masking_images: int = MASKING_IMAGES,
) -> dict[str, Any]:
    """Accuracy of a checkpoint on test images, clean and under attacks.

    The model is in eval mode and computes in full fp32 (no autocast, no TF32). Where torch's default
    process group is initialized (`joined`), its processes share the batches.

    Args:
        path: a run folder or a checkpoint.
        attacks: names as `named_attack` takes.
        settings: all else.
        transfer: also classify images attacked on the reference backend by the run's, and back.
        masking_images: the first so many images undergo `MaskingChecks`; none if 0.

    Returns:
        JSON types, the same in every process: "accuracy", "confidence_95" and "outcomes" as
        `summary` returns, with "clean" and "worst" (right on the image and under every attack);
        "attacks", by name the library that served it, and what that warned of; "masking" as
        `MaskingChecks.run` and "transfer" as `transfer_report` return them (None where not asked
        for); "processes" and "sharing", how many took part and how; "precision"; and where it comes
        from: checkpoint, data, radius, seed, device, backend, versions, settings.

    Raises:
        FileNotFoundError, ValueError: as `EvaluatedNetwork`; an unknown attack; masking_images below
            0; transfer from the reference backend to itself.
        ImportError: the library of an attack is not installed.
    """
    if masking_images < 0:
        raise ValueError(f"masking_images must not be negative, got {masking_images}")
    tested = EvaluatedNetwork(path, settings or EvaluationSettings())
    own = tested.serving_backend()
    if transfer and own == REFERENCE:
        raise ValueError("transfer must go with another backend than reference")
    ranks = Ranks.current()
    made = [tested.attacks(attacks)]  # before any work: names can be wrong, libraries missing

    def measure(index: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def functions() -> dict[str, Attack]:
            made.append(tested.attacks(attacks, index))
            return made[-1]

        if transfer:
            return transfer_outcomes(tested.model, x, y, functions, own)
        return outcomes(tested.model, x, y, functions())

    with chosen_backend(tested.backend), full_float32():
        right = dealt(tested.batches(), measure, ranks)
        masking = _masking(tested, masking_images, ranks) if masking_images else None
    columns = (CLEAN, *attacks, WORST) if attacks else (CLEAN,)
    return {
        **tested.provenance(),
        "processes": ranks.size,
        "sharing": f"process p of n took batches p, p + n, ...; batch i is images "
        f"{tested.settings.batch_size} i and following, attacked with seed + i",
        "precision": "float32, no autocast, no TF32; eval mode; parameters frozen under attack",
        "attacks": _attacks(made, ranks),
        **summary({name: right[name] for name in columns}),
        "transfer": transfer_report(right, attacks, own) if transfer else None,
        "masking": masking,
    }


def _masking(tested: EvaluatedNetwork, images: int, ranks: Ranks) -> dict[str, Any]:
    checks = MaskingChecks(
        num_classes=tested.num_classes,
        eps=tested.eps,
        step_size=tested.step_size,
        norm=tested.settings.norm,
        seed=tested.settings.seed,
    )
    return checks.run(tested.model, tested.batches(images), ranks)


def _attacks(made: Sequence[Mapping[str, Attack]], ranks: Ranks) -> dict[str, Any]:
    """What served each attack, and what it warned of in any process, how often."""
    report: dict[str, Any] = {}
    for name in made[0]:
        functions = [attacks[name] for attacks in made]
        library = isinstance(functions[0], LibraryAttack)
        served = {"library": "ssp_fused", "version": __version__}
        warned: Counter[str] = Counter()
        if library:
            served = functions[0].served_by()
            for function in functions:
                warned.update(function.warnings)
        total = sum(ranks.gather(warned), Counter())
        report[name] = {**served, "warnings": dict(sorted(total.items()))}
    return report


def _digest(images: data.ImageSet) -> str:
    """SHA-256 of the images' bytes, and the labels' behind them."""
    digest = hashlib.sha256()
    for tensor in (images.images.cpu().contiguous(), images.labels.cpu().contiguous()):
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return digest.hexdigest()


def _radius(settings: EvaluationSettings, config: TrainConfig) -> tuple[float, float]:
    """Radius and step size in the norm of the attack."""
    eps, step_size = settings.eps, settings.step_size
    if settings.norm == "l2":
        if eps is None:
            raise ValueError("eps must be given with norm l2: the run's is an l-infinity radius")
        if step_size is None:
            if not config.eps:
                raise ValueError("step_size must be given with norm l2: the run has no eps")
            step_size = eps * config.step_size / config.eps
    return (
        config.eps if eps is None else eps,
        config.step_size if step_size is None else step_size,
    )


def _test_data(settings: EvaluationSettings, config: TrainConfig) -> tuple[str, data.ImageSplits]:
    """The name of the data set, and the data."""
    name, data_dir, image_size = config.data, config.data_dir, config.image_size
    if settings.data is not None:
        both_folders = settings.data.startswith(data.FOLDER_PREFIX) and name.startswith(
            data.FOLDER_PREFIX
        )
        if settings.data != name and not both_folders:
            image_size = None
        name, data_dir = settings.data, None
    place = TrainConfig(data=name, data_dir=data_dir).at(data_dir=settings.data_dir)
    with Ranks.current().first_before_others() if settings.download else nullcontext():
        splits = data.load(
            place.data,
            place.data_dir,
            download=settings.download,
            image_size=settings.image_size or image_size,
        )
    return place.data, splits


def _check_fit(spec: dict[str, Any], name: str, splits: data.ImageSplits) -> None:
    channels, height, width = splits.image_shape
    smallest = NETWORKS[spec["network"]].smallest
    arguments = spec["arguments"]
    found = (channels, splits.num_classes)
    if found != (arguments["in_channels"], arguments["num_classes"]):
        raise ValueError(
            f"data must have images of {arguments['in_channels']} channels in "
            f"{arguments['num_classes']} classes, as the network; {name} has {channels} channels, "
            f"{splits.num_classes} classes"
        )
    if min(height, width) < smallest:
        raise ValueError(
            f"data must have images of at least {smallest}x{smallest} pixels, those of {name} are "
            f"{height}x{width}"
        )


def _batches_after_epoch(state: dict[str, Any]) -> int:
    """How far into the next epoch a stopped run's last state is."""
    return state["training"]["totals"]["batches"] if "training" in state else 0


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
