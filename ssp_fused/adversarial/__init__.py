"""Attacks, losses built on them, training, and what is measured on trained networks."""

from __future__ import annotations

from .attacks import cross_entropy_per_sample, fgsm, margin_per_sample, pgd
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .conversion import PublishedNetwork, convert_checkpoint
from .evaluation import EvaluationSettings, evaluate_checkpoint
from .growth import checkpoint_growth, perturbation_growth
from .interrupts import TrainingInterrupted
from .losses import TrainingLoss, clean_loss, pgd_loss
from .named import named_attack, named_attacks
from .run import fit, resume
from .training import EpochResult, evaluate, train_epoch

__all__ = [
    "EpochResult",
    "EvaluationSettings",
    "PublishedNetwork",
    "TrainConfig",
    "TrainingInterrupted",
    "TrainingLoss",
    "checkpoint_growth",
    "clean_loss",
    "convert_checkpoint",
    "cross_entropy_per_sample",
    "evaluate",
    "evaluate_checkpoint",
    "fgsm",
    "fit",
    "load_checkpoint",
    "margin_per_sample",
    "named_attack",
    "named_attacks",
    "perturbation_growth",
    "pgd",
    "pgd_loss",
    "resume",
    "save_checkpoint",
    "train_epoch",
]
