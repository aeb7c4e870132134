"""Attacks, losses built on them, training, and what is measured on trained networks."""

from __future__ import annotations

from .attacks import cross_entropy_per_sample, fgsm, margin_per_sample, pgd
from .checkpoint import load_checkpoint, save_checkpoint
from .comparison import Comparison
from .config import TrainConfig
from .conversion import PublishedNetwork, convert_checkpoint
from .curve import checkpoint_curve
from .distributed import Ranks, joined
from .evaluation import EvaluationSettings, evaluate_checkpoint
from .fast import FreeLoss, fgsm_rs_loss, n_fgsm_loss, replayed
from .graphs import GraphCache, clear_graphs
from .growth import checkpoint_growth, perturbation_growth
from .history import run_history
from .interrupts import TrainingInterrupted
from .lipschitz import jacobian_norms
from .losses import TrainingLoss, clean_loss, pgd_loss
from .masking import MaskingChecks
from .named import named_attack, named_attacks
from .precision import Precision
from .reproduction import reproduce
from .run import fit, resume
from .trades import mart_loss, trades_loss
from .training import EpochResult, evaluate, train_epoch

__all__ = [
    "Comparison",
    "EpochResult",
    "EvaluationSettings",
    "FreeLoss",
    "GraphCache",
    "MaskingChecks",
    "Precision",
    "PublishedNetwork",
    "Ranks",
    "TrainConfig",
    "TrainingInterrupted",
    "TrainingLoss",
    "checkpoint_curve",
    "checkpoint_growth",
    "clean_loss",
    "clear_graphs",
    "convert_checkpoint",
    "cross_entropy_per_sample",
    "evaluate",
    "evaluate_checkpoint",
    "fgsm",
    "fgsm_rs_loss",
    "fit",
    "jacobian_norms",
    "joined",
    "load_checkpoint",
    "margin_per_sample",
    "mart_loss",
    "n_fgsm_loss",
    "named_attack",
    "named_attacks",
    "perturbation_growth",
    "pgd",
    "pgd_loss",
    "replayed",
    "reproduce",
    "resume",
    "run_history",
    "save_checkpoint",
    "trades_loss",
    "train_epoch",
]
