"""Averages of the weights along a run, by torch's utilities: exponential moving, and stochastic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from .training import Batches

if TYPE_CHECKING:
    from .config import TrainConfig

EMA, SWA = "ema", "swa"
AVERAGES = ("none", EMA, SWA)


def averaged_model(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The average that a run keeps beside its network; None where it keeps none.

    The exponential moving average is taken over parameters and running statistics, the stochastic
    one (Izmailov et al., UAI 2018) over parameters, after which `end_epoch` computes the running
    statistics anew.
    """
    if config.average == EMA:
        decay = get_ema_multi_avg_fn(config.ema_decay)
        return AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    return AveragedModel(model) if config.average == SWA else None


def end_epoch(
    average: AveragedModel,
    model: nn.Module,
    config: TrainConfig,
    epoch: int,
    batches: Callable[[], Batches],
) -> None:
    """With SWA, from epoch `swa_start` on: take the epoch's weights in, and their statistics anew.

    Args:
        average: of `averaged_model`.
        model: the network at the end of the epoch.
        config: resolved settings.
        epoch: the one that ends, from 1.
        batches: makes batches of training images, for the running statistics.
    """
    # An epoch that was stopped in its validation ends twice.
    if config.average == SWA and average.n_averaged <= epoch - config.swa_start:
        average.update_parameters(model)
        update_bn(batches(), average)
