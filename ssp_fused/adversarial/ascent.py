"""What every attack does: the model frozen, and a loss climbed within a ball around the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import functional
from . import graphs

AttackLoss = Callable[[Tensor, Tensor], Tensor]

_STEPS = {"linf": functional.linf_step, "l2": functional.l2_step}
NORMS = tuple(_STEPS)
BN_MODES = ("eval", "train")


@dataclass(frozen=True)
class Steps:
    """The steps of an attack and what they are kept in.

    Attributes:
        norm: "linf" or "l2".
        eps: radius of the ball, in units of the images.
        size: length of a step, same units.
        count: number of steps.
        bounds: smallest and largest pixel value.
    """

    norm: str
    eps: float
    size: float
    count: int
    bounds: tuple[float, float]

    def one(self, x_adv: Tensor, grad: Tensor, centre: Tensor) -> Tensor:
        """One step up the gradient, back into the ball around `centre` and into the bounds."""
        step = _STEPS[self.norm]
        return step(x_adv, grad, centre, step_size=self.size, eps=self.eps, bounds=self.bounds)


def attacked_module(model: nn.Module) -> nn.Module:
    """What an attack calls: inside DistributedDataParallel the wrapped module.

    No gradient of an attack is exchanged, and none of DistributedDataParallel's own forward pass.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def model_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode; afterwards each module's own, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def attack_mode(model: nn.Module, bn_mode: str) -> Iterator[None]:
    """Within it no parameter requires a gradient and the model is in eval or training mode.

    Afterwards, also after an exception, `requires_grad` of each parameter and `training` of each
    module are what they were.

    Args:
        model: the model to attack.
        bn_mode: "eval" or "train".
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model_mode(model, training=bn_mode == "train"):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def full_precision(logits: Tensor) -> Tensor:
    """Logits in which a softmax can be taken: those that autocast left in 16 bits in fp32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Objective:
    """The per-sample losses that an attack climbs, for batches of whole copies of the target.

    Args:
        model: maps images to logits `[N, num_classes]`.
        loss: from (logits `[N, num_classes]`, target `[N, ...]`) to losses `[N]`.
    """

    def __init__(self, model: nn.Module, loss: AttackLoss) -> None:
        self.model = model
        self.loss = loss
        self._labels_checked = False

    def input_gradient(self, x_adv: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the summed losses at x_adv `[copies * N, ...]`, and the logits there."""
        leaf = x_adv.detach().requires_grad_()
        losses, logits = self(leaf, target)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return grad, logits.detach()

    def __call__(self, x_adv: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and logits, `[copies * N]` and `[copies * N, num_classes]`."""
        logits = self.model(x_adv)
        if logits.dim() != 2 or len(logits) != len(x_adv):
            raise ValueError(
                f"model must return logits [N, num_classes] with N = {len(x_adv)}, "
                f"got shape {tuple(logits.shape)}"
            )
        self._check_labels(target, logits.shape[1])
        logits = full_precision(logits)
        # A callable may hold tensors of N rows, so it sees N rows at a time.
        parts = [self.loss(part, target) for part in logits.split(len(target))]
        for part in parts:
            if part.shape != target.shape[:1]:
                raise ValueError(
                    f"loss must return one value per sample, shape {tuple(target.shape[:1])}, got "
                    f"{tuple(part.shape)}"
                )
        return torch.cat(parts) if len(parts) > 1 else parts[0], logits

    def _check_labels(self, target: Tensor, num_classes: int) -> None:
        """Once, and on the CPU only, where looking costs no synchronization."""
        if self._labels_checked or target.device.type != "cpu" or target.dim() != 1:
            return
        self._labels_checked = True
        if int(target.max()) >= num_classes:
            raise ValueError(
                f"y must be labels below num_classes = {num_classes}, got {int(target.max())}"
            )


def climb(
    objective: Objective, steps: Steps, start: Tensor, centre: Tensor, target: Tensor
) -> Tensor:
    """All steps from `start` within the ball around `centre`."""
    x_adv = start
    for _ in range(steps.count):
        grad, _ = objective.input_gradient(x_adv, target)
        x_adv = steps.one(x_adv, grad, centre)
    return x_adv


def climb_in_graph(
    objective: Objective, steps: Steps, start: Tensor, centre: Tensor, target: Tensor
) -> Tensor:
    """`climb` as one replay of a CUDA graph, captured where there is none that fits."""
    return graphs.CACHE.run(
        objective.model,
        partial(climb, objective, steps),
        (start, centre, target),
        key=(steps, objective.loss),
    )


def climb_until_misclassified(
    objective: Objective, steps: Steps, start: Tensor, centre: Tensor, labels: Tensor
) -> Tensor:
    """`climb`, in which a sample that is misclassified before a step keeps its place from then on.

    It leaves the batch. The samples of a batch must not be coupled.
    """
    result = start.clone()
    labels = labels.repeat(len(start) // len(labels))
    left = torch.arange(len(start), device=start.device)
    x_adv = start
    for _ in range(steps.count):
        grad, logits = objective.input_gradient(x_adv, labels[left])
        still = (logits.argmax(dim=1) == labels[left]).nonzero().squeeze(1)
        left, x_adv, grad = left[still], x_adv[still], grad[still]
        if not len(left):
            break
        x_adv = steps.one(x_adv, grad, centre[left])
        result[left] = x_adv
    return result


@torch.no_grad()
def worst(objective: Objective, found: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Each sample's worst among its restarts: misclassified before not, then the largest loss.

    Args:
        objective: what was climbed.
        found: attacked images, each `[copies * N, ...]`.
        x: images `[N, ...]`.
        y: labels `[N]`.
    """
    scores, wrong = [], []
    for x_adv in found:
        losses, logits = objective(x_adv, y)
        scores.append(losses.view(-1, len(x)))
        wrong.append(logits.argmax(dim=1).view(-1, len(x)) != y)
    score, fooled = torch.cat(scores), torch.cat(wrong)
    score = score.masked_fill(fooled.any(dim=0) & ~fooled, -math.inf)
    row = score.argmax(dim=0) * len(x) + torch.arange(len(x), device=x.device)
    return torch.empty_like(x).copy_(torch.cat(found)[row])
