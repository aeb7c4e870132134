"""The optimizer of a run, and the schedule of its learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import lr_scheduler

if TYPE_CHECKING:
    from .config import TrainConfig

MULTISTEP = "multistep"
SCHEDULES = ("cosine", "onecycle", MULTISTEP)
# Of 200 epochs the published 80, 140 and 180.
_MILESTONES = (0.4, 0.7, 0.9)


def default_milestones(epochs: int) -> tuple[int, ...]:
    """The epochs after which the rate of a piecewise constant schedule falls."""
    return tuple(sorted({max(round(share * epochs), 1) for share in _MILESTONES}))


def optimizer_and_schedule(
    model: nn.Module, config: TrainConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    """SGD, and its schedule in steps of the optimizer.

    Args:
        model: whose parameters are trained.
        config: resolved settings.
        steps_per_epoch: steps of the optimizer in an epoch.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    steps = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == MULTISTEP:
        milestones = [epoch * steps_per_epoch for epoch in config.milestones]
        return optimizer, lr_scheduler.MultiStepLR(optimizer, milestones)
    # Momentum stays where it was asked to be: only the learning rate cycles.
    return optimizer, lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=steps, cycle_momentum=False
    )
