"""Attacks, losses built on them, and training."""

from __future__ import annotations

from .attacks import cross_entropy_per_sample, fgsm, margin_per_sample, pgd
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .losses import TrainingLoss, clean_loss, pgd_loss
from .run import fit
from .training import EpochResult, evaluate, standard_attacks, train_epoch

__all__ = [
    "EpochResult",
    "TrainConfig",
    "TrainingLoss",
    "clean_loss",
    "cross_entropy_per_sample",
    "evaluate",
    "fgsm",
    "fit",
    "load_checkpoint",
    "margin_per_sample",
    "pgd",
    "pgd_loss",
    "save_checkpoint",
    "standard_attacks",
    "train_epoch",
]
