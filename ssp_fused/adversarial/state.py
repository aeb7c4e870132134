"""The state of a training run: all that decides how it goes on, to save and to load."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from .config import TrainConfig, build_network
from .training import RunningTotals

_ATTACK = "attack"


class TrainingState:
    """Network, optimizer, schedule, random numbers, and where in which epoch the run is.

    Loading what `state_dict` returned, between two batches or two epochs, continues the run: on
    the CPU with the same bits as if nothing had happened.

    Attributes:
        model, optimizer, scheduler: what is trained, and what by.
        history: the metrics of the epochs that have ended.
        best: which of them (from 1) was best on validation images; 0 before the first.
        totals: of the epoch that is being trained.
        attack_generator: of its random starts.
        learning_rate: at its beginning.

    Args:
        config: resolved settings; torch's random state is set by their seed.
        spec: the network (`network_spec`).
        batches_per_epoch: optimizer steps in an epoch.
    """

    def __init__(self, config: TrainConfig, spec: dict[str, Any], batches_per_epoch: int) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.spec = spec
        self.model = build_network(spec).to(config.device)
        self.optimizer, self.scheduler = _optimizer(
            self.model, config, config.epochs * batches_per_epoch
        )
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

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Note an epoch's metrics and begin the next one."""
        criterion = "val_clean" if self.config.method == "none" else "val_robust"
        self.history.append(metrics)
        if not self.best or metrics[criterion] > self.history[self.best - 1][criterion]:
            self.best = len(self.history)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.totals = RunningTotals()
        self.attack_generator = seeded_generator(self.config, _ATTACK, self.epoch)
        self.learning_rate: float = self.optimizer.param_groups[0]["lr"]

    def checkpoint(self) -> dict[str, Any]:
        """What evaluation needs: the network, its settings, the metrics of the last full epoch."""
        return {
            "model": self.model.state_dict(),
            "network": self.spec,
            "config": self.config.to_dict(),
            "epoch": len(self.history),
            "metrics": self.history[-1] if self.history else {},
        }

    def state_dict(self) -> dict[str, Any]:
        """`checkpoint`, and all else; tensors and plain types."""
        device = torch.device(self.config.device)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best": self.best,
            "totals": self.totals.state_dict(),
            "learning_rate": self.learning_rate,
            "device": device.type,
            "attack_generator": self.attack_generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "device_generator": _device_generator_state(device),
        }
        return {**self.checkpoint(), "training": training}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        On a device of another type than before, random numbers are new: theirs cannot go on.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: `state` is something else.
        """
        training = state["training"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        self.history = list(training["history"])
        self.best = training["best"]
        self._begin_epoch()
        self.totals = RunningTotals(training["totals"])
        self.learning_rate = training["learning_rate"]
        torch.set_rng_state(training["torch_generator"])
        device = torch.device(self.config.device)
        if device.type != training["device"]:
            purpose = f"{_ATTACK} from batch {self.totals.batches}"
            self.attack_generator = seeded_generator(self.config, purpose, self.epoch)
            return
        self.attack_generator.set_state(training["attack_generator"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(training["device_generator"], device)


def derived_seed(seed: int, purpose: str, epoch: int) -> int:
    """A seed of its own for every purpose and epoch, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{epoch}".encode()).digest()[:7], "big")


def seeded_generator(config: TrainConfig, purpose: str, epoch: int) -> torch.Generator:
    """A generator on the run's device with the `derived_seed`."""
    return torch.Generator(config.device).manual_seed(derived_seed(config.seed, purpose, epoch))


def _device_generator_state(device: torch.device) -> torch.Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _optimizer(
    model: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    if config.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    # Momentum stays where it was asked to be: only the learning rate cycles.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=total_steps, cycle_momentum=False
    )
