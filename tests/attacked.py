"""What an attack has to leave as it was, and a small fused network to attack."""

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ssp_fused import data
from ssp_fused.adversarial import clean_loss, pgd_loss, train_epoch
from ssp_fused.nn import SSPBlock, SSPStack

CLASSES, EPS, STEP = 4, 0.15, 0.04


def snapshot(model: nn.Module) -> dict[str, list]:
    """Everything an attack has to leave as it was."""
    parameters = list(model.parameters())
    return {
        "parameters": [p.detach().clone() for p in parameters],
        "identities": [id(p) for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "buffers": [b.clone() for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
    }


def assert_same(before: dict[str, list], after: dict[str, list], *, buffers: bool = True) -> None:
    for key in ("identities", "requires_grad", "modes"):
        assert before[key] == after[key], key
    for key in ("parameters", "gradients", *(["buffers"] if buffers else [])):
        for old, new in zip(before[key], after[key], strict=True):
            assert (old is None and new is None) or torch.equal(old, new), key


def mixed_state(model: nn.Module) -> nn.Module:
    """Modes, gradients and frozen parameters as no uniform setting would leave them."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        if index % 2:
            parameter.grad = torch.randn_like(parameter)
    return model


def process_state() -> dict[str, Any]:
    """Random number generators, the tracing function, modes of autograd."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "trace": sys.gettrace(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
    }


def four_digits(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of the digits 0 to 3."""
    images = getattr(data.load("digits"), part)
    chosen = images.select((images.labels < CLASSES).nonzero().squeeze(1).tolist()[:count])
    return next(chosen.batches(len(chosen)))


def trained_network(*, attacked: bool) -> nn.Module:
    """A small network that knows four digits, trained on attacked or on clean images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        SSPStack(SSPBlock(8, "euler"), SSPBlock(8, "ssp22")),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )
    x, y = four_digits("train", 320)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss(model: nn.Module, x: Tensor, y: Tensor):
        return pgd_loss(model, x, y, eps=EPS, step_size=2 * STEP, steps=3)

    for _ in range(6):
        batches = zip(x.split(32), y.split(32), strict=True)
        train_epoch(model, batches, optimizer, loss if attacked else clean_loss)
    return model.eval()
