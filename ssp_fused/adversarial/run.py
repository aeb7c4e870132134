"""A whole training run: settings in, a folder of results out; and how it goes on after a stop."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..data import ImageSet, ImageSplits, load
from .attacks import pgd
from .checkpoint import BEST, LAST, missing_keys, read_tensors, save_checkpoint
from .config import TrainConfig, checked_device, chosen_backend, network_spec
from .files import write_json, write_text
from .interrupts import Interrupts, TrainingInterrupted
from .losses import LossFunction, clean_loss, pgd_loss
from .progress import Progress
from .state import TrainingState, derived_seed, seeded_generator
from .training import Batches, EpochResult, evaluate, train_epoch

CONFIG, METRICS = "config.json", "metrics.jsonl"
EVALUATION_BATCH = 500
# A validation set cut down with the training set stays large enough to choose by.
_MIN_LIMITED_VALIDATION = 100
_ORDER, _AUGMENT, _VALIDATION = "order", "augment", "validation"


def fit(
    config: TrainConfig, splits: ImageSplits | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Train a network and keep the epoch that is best on validation data.

    Best means the highest accuracy under the training attack, or on clean images with method
    "none". The test set is not looked at. With one machine and thread count, the same settings
    give the same numbers. torch's global random state is set by the seed.

    Files in `config.out`: config.json, metrics.jsonl (a line per epoch), best.pt, and last.pt,
    from which `resume` goes on. Ctrl-C (in the main thread) ends the run after the batch at hand,
    with its state saved there; a second one at once, leaving the state of the last epoch's end.

    Args:
        config: settings; `resolved` is applied to them.
        splits: the data; loaded by its name if None.
        progress: print a line per epoch, and show a progress bar if stderr is a terminal.

    Returns:
        "best" and "last", the metrics of those epochs; "epochs", those of all; "out", the folder.

    Raises:
        ValueError: a bad setting, a folder that already holds a run, damaged data.
        FloatingPointError: the loss is no longer finite.
        TrainingInterrupted: after Ctrl-C.
    """
    config = config.resolved()
    if (Path(config.out) / CONFIG).exists():
        raise ValueError(
            f"out: {config.out} already holds a training run; to go on with it: "
            f"{_resume_command(config.out)}"
        )
    with chosen_backend(config.backend):
        return _Run(config, splits, progress).finish()


def resume(
    run_dir: str | Path,
    splits: ImageSplits | None = None,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Go on with a run that was stopped, from the state in its last.pt.

    On the CPU, with the same thread count, the result has the same bits as that of a run that was
    not stopped, but for the times.

    Args:
        run_dir: the run folder.
        splits: the data; loaded by its name if None.
        data_dir: where the data is now, if elsewhere; for a folder of images, that folder.
        device: where to compute, if elsewhere.
        backend: implementation of the layers, if another.
        progress: as in `fit`.

    Returns:
        As `fit`; at once, where all epochs are trained.

    Raises:
        FileNotFoundError: there is no run, or it was stopped before its first save.
        ValueError: a damaged file; settings or data that are not those of the saved state.
        FloatingPointError, TrainingInterrupted: as `fit`.
    """
    saved, state = _read_run(Path(run_dir))
    config = replace(saved.at(data_dir=data_dir, device=device, backend=backend), out=str(run_dir))
    config = replace(config, device=checked_device(config.device))
    with chosen_backend(config.backend):
        run = _Run(config, splits, progress)
        run.load(state)
        return run.finish()


def _read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a run and its last saved state."""
    settings, last = folder / CONFIG, folder / LAST
    if not settings.is_file():
        raise FileNotFoundError(f"no training run in {folder}: there is no {settings}")
    if not last.is_file():
        raise FileNotFoundError(
            f"no {last}: the run was stopped before its first save; remove {folder} to begin again"
        )
    try:
        config = TrainConfig.from_dict(json.loads(settings.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{settings}: not the settings of a run ({error})") from error
    state = read_tensors(last)
    missing = missing_keys(state, "training", "images")
    if missing:
        raise ValueError(f"{last}: not the state of a training run, lacks {', '.join(missing)}")
    try:
        different = config.differences(TrainConfig.from_dict(state["config"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{last}: not the state of a training run ({error})") from error
    if different:
        raise ValueError(f"{settings}: {', '.join(different)} not as in {last}")
    return config, state


class _Run:
    """A training run in its folder."""

    def __init__(self, config: TrainConfig, splits: ImageSplits | None, progress: bool) -> None:
        self.config = config
        self.out = Path(config.out)
        self.progress = progress
        if splits is None:
            splits = load(
                config.data,
                config.data_dir,
                download=config.download,
                image_size=config.image_size,
            )
        self.train, self.val = _training_data(config, splits, progress)
        self.batches = self.train.batch_count(config.batch_size, drop_last=True)
        self.images = {"train": len(self.train), "val": len(self.val)}
        self.state = TrainingState(config, network_spec(config, splits), self.batches)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if state["images"] != self.images or state["network"] != self.state.spec:
            raise ValueError(
                f"data: {self.config.data} has changed since the run began (training and "
                f"validation images, then {state['images']}, now {self.images}; their shape, mean "
                "and deviation, and the number of classes must be the same too)"
            )
        try:
            self.state.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.out / LAST}: cannot be continued ({reason})") from error
        if self.progress:
            print(self._position(), flush=True)

    def _position(self) -> str:
        if self.state.epoch > self.config.epochs:
            return f"{self.out} is finished: all {self.config.epochs} epochs are trained"
        done = self.state.totals.batches
        return f"going on with epoch {self.state.epoch} after batch {done} of {self.batches}"

    def finish(self) -> dict[str, Any]:
        """Train what is left of the run."""
        state = self.state
        images = self.batches * min(self.config.batch_size, len(self.train))
        report = Progress(
            self.config.epochs,
            images,
            self.progress,
            epoch=state.epoch,
            images=len(state.history) * images + state.totals.images,
        )
        with report, Interrupts() as interrupts:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / CONFIG, self.config.to_dict())
            self._write_results()
            try:
                while state.epoch <= self.config.epochs:
                    self._train_epoch(interrupts, report)
            except TrainingInterrupted:
                self._save()
                raise TrainingInterrupted(
                    f"stopped in epoch {state.epoch} after batch {state.totals.batches} of "
                    f"{self.batches}, state saved; to go on: {_resume_command(self.out)}"
                ) from None
        history = state.history
        return {
            "best": history[state.best - 1],
            "last": history[-1],
            "epochs": history,
            "out": str(self.out),
        }

    def _train_epoch(self, interrupts: Interrupts, report: Progress) -> None:
        config, state = self.config, self.state
        batches = self.train.batches(
            config.batch_size,
            shuffle_seed=derived_seed(config.seed, _ORDER, state.epoch),
            drop_last=True,
            start=state.totals.batches,
            augment=config.augment,
            augment_seed=derived_seed(config.seed, _AUGMENT, state.epoch),
        )
        result = train_epoch(
            state.model,
            interrupts.watch(batches),
            state.optimizer,
            _loss_function(state),
            scheduler=state.scheduler,
            on_batch=report.on_batch,
            totals=state.totals,
        )
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"training diverged: the loss of epoch {state.epoch} is {result.loss}; "
                "a smaller lr may help"
            )
        val = interrupts.watch(self.val.batches(EVALUATION_BATCH))
        state.end_epoch(_metrics(state, result, _validate(state.model, val, config)))
        self._save()
        self._write_results()
        report.on_epoch(state.history[-1], is_best=state.is_best)

    def _save(self) -> None:
        save_checkpoint(self.out / LAST, {**self.state.state_dict(), "images": self.images})

    def _write_results(self) -> None:
        """Bring best.pt and metrics.jsonl to what last.pt holds, from which they can be made."""
        if self.state.is_best:
            save_checkpoint(self.out / BEST, self.state.checkpoint())
        lines = (json.dumps(metrics) + "\n" for metrics in self.state.history)
        write_text(self.out / METRICS, "".join(lines))


def _resume_command(folder: str | Path) -> str:
    return f"ssp-fused train --resume {shlex.quote(str(folder))}"


def _training_data(
    config: TrainConfig, splits: ImageSplits, progress: bool
) -> tuple[ImageSet, ImageSet]:
    train, val = splits.train, splits.val
    if config.limit is not None:
        train = train.take(config.limit)
        val = val.take(max(config.limit // 5, _MIN_LIMITED_VALIDATION))
        if progress:
            print(f"limited to {len(train)} training and {len(val)} validation images", flush=True)
    return train.to(config.device), val.to(config.device)


def _loss_function(state: TrainingState) -> LossFunction:
    if state.config.method == "none":
        return clean_loss
    return partial(pgd_loss, **state.config.attack(), generator=state.attack_generator)


def _metrics(
    state: TrainingState, result: EpochResult, validation: dict[str, float]
) -> dict[str, Any]:
    return {
        "epoch": state.epoch,
        "lr": state.learning_rate,
        "train_loss": result.loss,
        "train_accuracy": result.accuracy,
        **validation,
        "images_per_second": result.images / result.seconds,
        "seconds": result.seconds,
    }


def _validate(model: nn.Module, batches: Batches, config: TrainConfig) -> dict[str, float]:
    """Accuracies to choose by; the attack starts from the same points in every epoch."""
    if config.method == "none":
        return {"val_clean": evaluate(model, batches)["clean"]}
    generator = seeded_generator(config, _VALIDATION, 0)
    attack = partial(pgd, **config.attack(), generator=generator)
    accuracies = evaluate(model, batches, {"robust": attack})
    return {f"val_{name}": accuracies[name] for name in ("clean", "robust")}
