"""A whole training run: settings in, a folder of results out; and how it goes on after a stop."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._log import LOG
from ..data import ImageSet, ImageSplits, load
from .attacks import pgd
from .checkpoint import BEST, LAST, missing_keys, read_tensors, save_checkpoint
from .config import TrainConfig
from .devices import checked_device, chosen_backend
from .distributed import Ranks, is_lost_peer
from .fast import replayed
from .files import write_json, write_text
from .interrupts import Interrupts, TrainingInterrupted
from .methods import CLEAN
from .networks import network_spec
from .progress import Progress
from .state import TrainingState, derived_seed, seeded_generator
from .tensorboard import check_tensorboard, epoch_scalars
from .training import Batches, EpochResult, RunningTotals, evaluate, train_epoch

CONFIG, METRICS = "config.json", "metrics.jsonl"
EVALUATION_BATCH = 500
# A validation set cut down with the training set stays large enough to choose by.
_MIN_LIMITED_VALIDATION = 100
# Accuracy on attacked training images over that on clean validation images. Overfitting, robust
# overfitting included, stays far below it.
_MODE_GAP = 0.2
_ORDER, _STATISTICS, _AUGMENT, _VALIDATION = "order", "statistics", "augment", "validation"


def fit(
    config: TrainConfig, splits: ImageSplits | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Train a network and keep the epoch that is best on validation data.

    Best means the highest accuracy under the training attack, or on clean images with method
    "none". The test set is not looked at. With one machine and thread count, the same settings
    give the same numbers. torch's global random state is set by the seed.

    Files in `config.out`: config.json, metrics.jsonl (a line per epoch), best.pt, and last.pt,
    from which `resume` goes on; with `config.tensorboard` event files. Ctrl-C (in the main thread)
    ends the run after the batch at hand, with its state saved there; a second one at once, leaving
    the state of the last epoch's end.

    Where torch.distributed's default process group is initialized (`joined`), the run is that of
    all its processes: each takes its part of every batch and of the validation images, attacks
    with random numbers of its own, and the first one writes and prints. Which images are in which
    batch does not depend on the number of processes.

    Args:
        config: settings; `resolved` is applied to them.
        splits: the data; loaded by its name if None.
        progress: print a line per epoch, and show a progress bar if stderr is a terminal.

    Returns:
        "best" and "last", the metrics of those epochs; "epochs", those of all; "out", the folder.

    Raises:
        ValueError: a bad setting, a folder that already holds a run, damaged data.
        ImportError: TensorBoard is asked for and not installed.
        FloatingPointError: the loss is no longer finite.
        TrainingInterrupted: after Ctrl-C.
    """
    config = config.resolved()
    # Asked by all before the first process writes it.
    if Ranks.current().any((Path(config.out) / CONFIG).exists()):
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
    not stopped, but for the times; with several processes, where there are as many as before and
    their running statistics are the same (sync_bn, group norms). There may be more or fewer
    processes than before, random numbers are then new.

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
        ImportError, FloatingPointError, TrainingInterrupted: as `fit`.
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
    """A training run in its folder, as one of its processes sees it."""

    def __init__(self, config: TrainConfig, splits: ImageSplits | None, progress: bool) -> None:
        self.config = config
        self.out = Path(config.out)
        self.ranks = Ranks.current()
        self.progress = progress and self.ranks.is_first
        if config.tensorboard:
            check_tensorboard()
        if splits is None:
            splits = _loaded(config, self.ranks)
        self.train, self.val = _training_data(config, splits, self.progress)
        self.batches = self.train.batch_count(config.batch_size, drop_last=True)
        _check_processes(config, min(config.batch_size, len(self.train)), self.ranks)
        self.replays = config.replays or 1
        self.steps = self.batches * self.replays
        self.images = {"train": len(self.train), "val": len(self.val)}
        spec = network_spec(config, splits)
        self.state = TrainingState(config, spec, self.steps, self.ranks)

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
        return f"going on with epoch {self.state.epoch} after batch {done} of {self.steps}"

    def finish(self) -> dict[str, Any]:
        """Train what is left of the run."""
        state = self.state
        images = self.steps * min(self.config.batch_size, len(self.train))
        report = Progress(
            self.config.epochs,
            images,
            self.progress,
            epoch=state.epoch,
            images=len(state.history) * images + state.totals.images,
        )
        with report, self._scalars() as write_scalars, Interrupts() as interrupts:
            if self.ranks.is_first:
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / CONFIG, self.config.to_dict())
                self._write_results()
            try:
                while state.epoch <= self.config.epochs:
                    self._train_epoch(interrupts, report)
                    write_scalars(state.history[-1])
            except TrainingInterrupted:
                self._save()
                raise TrainingInterrupted(
                    f"stopped in epoch {state.epoch} after batch {state.totals.batches} of "
                    f"{self.steps}, state saved; to go on: {_resume_command(self.out)}"
                ) from None
            except RuntimeError as error:
                if self.ranks.size > 1 and is_lost_peer(error):
                    raise RuntimeError(self._without_peer(error)) from error
                raise
        history = state.history
        return {
            "best": history[state.best - 1],
            "last": history[-1],
            "epochs": history,
            "out": str(self.out),
        }

    def _scalars(self) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
        if self.config.tensorboard and self.ranks.is_first:
            return epoch_scalars(self.out, self.state.history)
        return nullcontext(lambda metrics: None)

    def _without_peer(self, error: RuntimeError) -> str:
        saved = "nothing is saved yet"
        if (self.out / LAST).exists():
            saved = f"to go on from the last saved state: {_resume_command(self.out)}"
        reason = str(error).split("\n")[0].split(". ")[0]
        return (
            f"another of the {self.ranks.size} processes is gone in epoch {self.state.epoch}; "
            f"{saved} ({reason})"
        )

    def _train_epoch(self, interrupts: Interrupts, report: Progress) -> None:
        config, state = self.config, self.state

        def on_batch(images: int, totals: RunningTotals) -> None:
            state.end_step()
            report.on_batch(images * self.ranks.size, totals)
            if config.save_every is not None and totals.batches % config.save_every == 0:
                self._save()

        train_epoch(
            state.parallel,
            interrupts.watch(self._training_batches(_ORDER, state.totals.batches), self.ranks.any),
            state.optimizer,
            state.loss,
            scheduler=state.scheduler,
            accumulate=config.accumulate,
            precision=state.precision,
            on_batch=on_batch,
            totals=state.totals,
        )
        result = state.totals.over(self.ranks).result()
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"training diverged: the loss of epoch {state.epoch} is {result.loss}; "
                "a smaller lr may help"
            )
        state.end_training(partial(self._training_batches, _STATISTICS))
        val = self.val.batches(EVALUATION_BATCH, part=self.ranks.part)
        validation = _validate(state, interrupts.watch(val, self.ranks.any))
        state.end_epoch(_metrics(state, result, validation))
        self._save()
        if self.ranks.is_first:
            self._write_results()
            _warn_of_mode_gap(config, state.history[-1])
            report.on_epoch(state.history[-1], is_best=state.is_best)

    def _training_batches(self, purpose: str, done: int = 0) -> Batches:
        """This process's parts of an epoch's batches, each as often as it is trained on."""
        config, epoch = self.config, self.state.epoch
        start, replay = divmod(done, self.replays)
        batches = self.train.batches(
            config.batch_size,
            shuffle_seed=derived_seed(config.seed, purpose, epoch),
            drop_last=True,
            start=start,
            augment=config.augment,
            augment_seed=derived_seed(config.seed, f"{purpose} {_AUGMENT}", epoch),
            part=self.ranks.part,
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        laid_out = ((x.contiguous(memory_format=layout), y) for x, y in batches)
        return replayed(laid_out, self.replays, replay)

    def _save(self) -> None:
        state = {**self.state.state_dict(), "images": self.images}
        if self.ranks.is_first:
            save_checkpoint(self.out / LAST, state)

    def _write_results(self) -> None:
        """Bring best.pt and metrics.jsonl to what last.pt holds, from which they can be made."""
        if self.state.is_best:
            save_checkpoint(self.out / BEST, self.state.checkpoint())
        lines = (json.dumps(metrics) + "\n" for metrics in self.state.history)
        write_text(self.out / METRICS, "".join(lines))


def _resume_command(folder: str | Path) -> str:
    return f"ssp-fused train --resume {shlex.quote(str(folder))}"


def _loaded(config: TrainConfig, ranks: Ranks) -> ImageSplits:
    """The data; files that are missing are fetched by one process."""
    with ranks.first_before_others() if config.download else nullcontext():
        return load(
            config.data,
            config.data_dir,
            download=config.download,
            image_size=config.image_size,
        )


def _check_processes(config: TrainConfig, images: int, ranks: Ranks) -> None:
    if ranks.size > 1 and torch.device(config.device).index is not None:
        raise ValueError(
            f"device must be cpu or cuda with several processes, got {config.device!r}"
        )
    if images % ranks.size:
        raise ValueError(
            f"batch_size must divide among {ranks.size} processes, got batches of {images} images"
        )


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


def _warn_of_mode_gap(config: TrainConfig, metrics: dict[str, Any]) -> None:
    """Say so when a network has learned to differ between its modes in place of robustness.

    An attack on the network in eval mode does not hurt the one in training mode where their
    statistics are far apart, as those of norms that several stages share can be.
    """
    trained, clean = metrics["train_accuracy"], metrics["val_clean"]
    if config.method != CLEAN and config.bn_mode == "eval" and trained - clean > _MODE_GAP:
        LOG.warning(
            "epoch %d: attacked training images are classified better (%.1f%%) than clean "
            "validation images (%.1f%%): the attack, in eval mode, does not reach the network in "
            "training mode; --bn-mode train attacks the latter",
            metrics["epoch"],
            100 * trained,
            100 * clean,
        )


def _validate(state: TrainingState, batches: Batches) -> dict[str, float]:
    """Accuracies to choose by; the attack starts from the same points in every epoch."""
    config, ranks = state.config, state.ranks
    if config.method == CLEAN:
        return {"val_clean": evaluate(state.evaluated, batches, ranks=ranks)["clean"]}
    generator = seeded_generator(config, _VALIDATION, ranks.rank)
    attack = partial(pgd, **config.attack(), generator=generator)
    accuracies = evaluate(state.evaluated, batches, {"robust": attack}, ranks=ranks)
    return {f"val_{name}": accuracies[name] for name in ("clean", "robust")}
