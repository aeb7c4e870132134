"""Training losses usable in anyone's loop: cross-entropy on images, and on PGD examples of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .ascent import full_precision
from .attacks import pgd


class TrainingLoss(NamedTuple):
    """What a training loss returns.

    Attributes:
        loss: scalar, the mean over the images, to call `.backward()` on.
        logits: `[N, num_classes]`, detached, of the images trained on (x, or its attacked copy).
    """

    loss: Tensor
    logits: Tensor


LossFunction = Callable[[nn.Module, Tensor, Tensor], TrainingLoss]


def clean_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, label_smoothing: float = 0.0
) -> TrainingLoss:
    """Cross-entropy on the images as they are.

    Args:
        model: maps images to logits `[N, num_classes]`; called in the mode it is in.
        x: images `[N, C, H, W]`.
        y: labels `[N]`, int64.
        label_smoothing: share of the target that all classes get alike (Szegedy et al., CVPR
            2016); 0 to 1.

    Returns:
        The mean loss, and the logits.
    """
    logits = full_precision(model(x))
    loss = functional.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return TrainingLoss(loss, logits.detach())


def pgd_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    random_start: bool = True,
    label_smoothing: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    early_stop: bool = False,
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingLoss:
    """Cross-entropy on PGD examples of the current model (Madry et al., ICLR 2018).

    The attack (arguments as in `pgd`) leaves modes, parameters and gradients alone; the loss is
    then taken in the mode the model is in, so that in training mode the running statistics see
    each attacked batch once (and, with bn_mode="train", the attack's iterates before it).

    Args:
        model: maps images to logits `[N, num_classes]`.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius of the attack, in units of x.
        step_size: length of one step, same units.
        steps: number of steps.
        norm: "linf" or "l2".
        random_start: start at a random point of the ball.
        label_smoothing: of the loss, not of the attack's; as in `clean_loss`.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train".
        early_stop: a sample that is misclassified is attacked no further.
        graph: replay the attack as a CUDA graph.
        generator: random numbers of the start, on the device of x.

    Returns:
        As `clean_loss`, at the attacked images.

    Raises:
        TypeError, ValueError: as `pgd`.
    """
    x_adv = pgd(
        model,
        x,
        y,
        eps=eps,
        step_size=step_size,
        steps=steps,
        norm=norm,
        random_start=random_start,
        bounds=bounds,
        bn_mode=bn_mode,
        early_stop=early_stop,
        graph=graph,
        generator=generator,
    )
    return clean_loss(model, x_adv, y, label_smoothing=label_smoothing)
