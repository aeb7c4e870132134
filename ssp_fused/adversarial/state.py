"""The state of a training run: all that decides how it goes on, to save and to load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .averaging import EMA, averaged_model, end_epoch
from .config import TrainConfig
from .distributed import Ranks
from .methods import CLEAN, FREE, loss_function
from .networks import build_network
from .precision import Precision
from .schedules import optimizer_and_schedule
from .training import Batches, RunningTotals

_ATTACK, _TORCH = "attack", "torch"


class TrainingState:
    """Network, optimizer, schedule, random numbers, and where in which epoch the run is.

    Loading what `state_dict` returned, between two batches or two epochs, continues the run: on
    the CPU with the same bits as if nothing had happened, where there are as many processes as
    before, and their running statistics are the same (one process, sync_bn, group norms).

    Attributes:
        model: the network, its parameters those that are trained.
        parallel: what is called in training: the same, in DistributedDataParallel where there are
            several processes.
        average: the average of its weights, if one is kept.
        optimizer, scheduler, precision, loss: what it is trained by.
        history: the metrics of the epochs that have ended.
        best: which of them (from 1) was best on validation images; 0 before the first.
        totals: of the epoch that is being trained, this process's part.
        learning_rate: at its beginning.

    Args:
        config: resolved settings; torch's random state is set by their seed.
        spec: the network (`network_spec`).
        steps_per_epoch: optimizer steps in an epoch.
        ranks: the processes of the run.
    """

    def __init__(
        self, config: TrainConfig, spec: dict[str, Any], steps_per_epoch: int, ranks: Ranks
    ) -> None:
        torch.manual_seed(config.seed)
        device = torch.device(config.device)
        self.config = config
        self.spec = spec
        self.ranks = ranks
        self.model = build_network(spec).to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.parallel = ranks.parallel(self.model)
        if config.sync_bn:
            # In place, parameters stay. Not before: on CPUs, DistributedDataParallel refuses modules
            # that hold SyncBatchNorm, whatever computes them.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = averaged_model(self.model, config)
        self.optimizer, self.scheduler = optimizer_and_schedule(self.model, config, steps_per_epoch)
        self.precision = Precision(config.amp, device.type)
        if config.compile:
            self.model.compile()
        self._generator = torch.Generator(config.device)
        self.loss = loss_function(config, self._generator)
        if not ranks.is_first:
            torch.manual_seed(derived_seed(config.seed, _of_rank(_TORCH, ranks.rank), 0))
        self.history: list[dict[str, Any]] = []
        self.best = 0
        self._begin_epoch()

    @property
    def epoch(self) -> int:
        """The epoch being trained, from 1; one more than there are when all have ended."""
        return len(self.history) + 1

    @property
    def is_best(self) -> bool:
        """Whether the network is as it was at the end of the best epoch."""
        return self.best > 0 and self.best == len(self.history) and self.totals.batches == 0

    @property
    def evaluated(self) -> nn.Module:
        """The network to validate and to keep: the average, as soon as it has taken weights in."""
        if self.average is None or not self.average.n_averaged:
            return self.model
        return self.average.module

    def end_step(self) -> None:
        """Note a step of the optimizer."""
        if self.config.average == EMA:
            self.average.update_parameters(self.model)

    def end_training(self, batches: Callable[[], Batches]) -> None:
        """Make the network ready for validation, at the end of an epoch.

        Args:
            batches: makes batches of training images.
        """
        if self.average is not None:
            end_epoch(self.average, self.model, self.config, self.epoch, batches)
            self.ranks.share_buffers(self.average)
        self.ranks.share_buffers(self.model)

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Note an epoch's metrics and begin the next one."""
        criterion = "val_clean" if self.config.method == CLEAN else "val_robust"
        self.history.append(metrics)
        if not self.best or metrics[criterion] > self.history[self.best - 1][criterion]:
            self.best = len(self.history)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.totals = RunningTotals()
        self._seed_attack(_ATTACK)
        self.learning_rate: float = self.optimizer.param_groups[0]["lr"]

    def _seed_attack(self, purpose: str) -> None:
        purpose = _of_rank(purpose, self.ranks.rank)
        self._generator.manual_seed(derived_seed(self.config.seed, purpose, self.epoch))

    def checkpoint(self) -> dict[str, Any]:
        """What evaluation needs: the network, its settings, the metrics of the last full epoch."""
        return {
            "model": self.evaluated.state_dict(),
            "network": self.spec,
            "config": self.config.to_dict(),
            "epoch": len(self.history),
            "metrics": self.history[-1] if self.history else {},
        }

    def state_dict(self) -> dict[str, Any]:
        """`checkpoint`, and all else; tensors and plain types.

        All processes call it; what the first one gets is the whole state.
        """
        training = {
            # The trained weights, where those of the checkpoint are an average.
            "model": None if self.evaluated is self.model else self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "history": self.history,
            "best": self.best,
            "totals": self.totals.over(self.ranks).state_dict(),
            "learning_rate": self.learning_rate,
            "device": torch.device(self.config.device).type,
            "ranks": self.ranks.gather(self._own_state()),
        }
        return {**self.checkpoint(), "training": training}

    def _own_state(self) -> dict[str, Any]:
        """What each process has for itself."""
        device = torch.device(self.config.device)
        return {
            "attack_generator": self._generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "device_generator": _device_generator_state(device),
            "loss": self.loss.state_dict() if self.config.method == FREE else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        With another number of processes than before, or on a device of another type, random
        numbers are new: theirs cannot go on. So is the perturbation of "free", with another number
        of processes.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: `state` is something else.
        """
        training = state["training"]
        self.model.load_state_dict(training["model"] or state["model"])
        if self.average is not None:
            self.average.load_state_dict(training["average"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        self.precision.scaler.load_state_dict(training["scaler"])
        self.history = list(training["history"])
        self.best = training["best"]
        self._begin_epoch()
        self.totals = RunningTotals(training["totals"]).share(self.ranks)
        self.learning_rate = training["learning_rate"]
        self._load_own_state(training["ranks"], training["device"])

    def _load_own_state(self, states: list[dict[str, Any]], device_type: str) -> None:
        device = torch.device(self.config.device)
        same_processes = len(states) == self.ranks.size
        if not same_processes or device.type != device_type:
            self._seed_attack(f"{_ATTACK} from batch {self.totals.batches}")
        if not same_processes:
            return
        own = states[self.ranks.rank]
        torch.set_rng_state(own["torch_generator"])
        if self.config.method == FREE:
            self.loss.load_state_dict(own["loss"])
        if device.type == device_type:
            self._generator.set_state(own["attack_generator"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(own["device_generator"], device)


def derived_seed(seed: int, purpose: str, epoch: int) -> int:
    """A seed of its own for every purpose and epoch, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()[:7], "big")


def seeded_generator(config: TrainConfig, purpose: str, rank: int) -> torch.Generator:
    """A generator on the run's device with the `derived_seed` of a process."""
    seed = derived_seed(config.seed, _of_rank(purpose, rank), 0)
    return torch.Generator(config.device).manual_seed(seed)


def _of_rank(purpose: str, rank: int) -> str:
    return f"{purpose} of rank {rank}" if rank else purpose


def _device_generator_state(device: torch.device) -> torch.Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
