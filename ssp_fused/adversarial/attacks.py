"""Gradient attacks on images: FGSM and PGD, in l-infinity and l2.

Sources: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015
(FGSM); Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018
(PGD); Carlini, Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017 (the margin
loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

from .ascent import (
    BN_MODES,
    NORMS,
    AttackLoss,
    Objective,
    Steps,
    attack_mode,
    attacked_module,
    climb,
    climb_in_graph,
    climb_until_misclassified,
    worst,
)

Start = Callable[[Tensor, Steps, "torch.Generator | None"], Tensor]


def cross_entropy_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample.

    Args:
        logits: `[N, num_classes]`.
        y: labels `[N]`, int64.

    Returns:
        The losses `[N]`.
    """
    return torch_functional.cross_entropy(logits, y, reduction="none")


def margin_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit less the true one.

    Positive exactly where the sample is misclassified (Carlini and Wagner 2017, f_6 without its
    floor). Its gradient does not vanish where the softmax saturates.

    Args:
        logits: `[N, num_classes]`.
        y: labels `[N]`, int64.

    Returns:
        The margins `[N]`, in units of the logits.
    """
    true = logits.gather(1, y.unsqueeze(1))
    wrong = logits.scatter(1, y.unsqueeze(1), -math.inf).amax(dim=1)
    return wrong - true.squeeze(1)


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy_per_sample, "margin": margin_per_sample}


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    norm: str = "linf",
    random_start: bool = False,
    restarts: int = 1,
    loss: str | AttackLoss = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The fast gradient sign method: one step of `pgd`, by default of length eps from x itself.

    Args:
        model: as in `pgd`, like all arguments not named here.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius of the ball, in units of x.
        step_size: length of the step; eps if None.
        norm: "linf" or "l2".
        random_start: start at a random point of the ball.
        restarts: random starts, of which each sample keeps its worst.
        loss: "ce", "margin" or a callable.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train".
        generator: random numbers, on the device of x.

    Returns:
        Attacked images, like x, detached.

    Raises:
        ValueError, TypeError: as `pgd`.
    """
    return pgd(
        model,
        x,
        y,
        eps=eps,
        step_size=eps if step_size is None else step_size,
        steps=1,
        norm=norm,
        random_start=random_start,
        restarts=restarts,
        loss=loss,
        bounds=bounds,
        bn_mode=bn_mode,
        generator=generator,
    )


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    random_start: bool = True,
    restarts: int = 1,
    loss: str | AttackLoss = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    early_stop: bool = False,
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent of the loss within a ball around x.

    Each step is `ssp_fused.functional.linf_step` or `l2_step`: step, projection onto the ball and
    clipping to the bounds. Only input gradients are computed: the parameters are frozen while the
    attack runs and get their `requires_grad` back afterwards, after an exception too; gradients
    in `.grad` are not touched. Under autocast the images and the steps keep x's precision. Not for
    a model that other threads use meanwhile. Inside DistributedDataParallel the wrapped module is
    attacked, and nothing is exchanged.

    Args:
        model: maps images to logits `[N, num_classes]`.
        x: images `[N, C, H, W]` (any trailing shape), floating point, within `bounds`.
        y: labels `[N]`, int64, on the device of x.
        eps: radius of the ball, in units of x.
        step_size: length of one step, same units.
        steps: number of steps, at least 1.
        norm: "linf" or "l2" (per sample, over all its pixels).
        random_start: start at a point drawn uniformly from the ball, not at x.
        restarts: how many random starts; every sample keeps its worst result: a misclassified
            one before others, then the largest loss. They run as one batch of restarts * N images
            (one after another in bn_mode "train", where samples of a batch are coupled). More of
            them never make the attack weaker.
        loss: "ce" (cross-entropy), "margin" (largest wrong logit less the true one) or a callable
            from (logits `[N, num_classes]`, y `[N]`) to losses `[N]`, which are ascended.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" attacks the model in eval mode: running statistics are used and stay as
            they are. "train" attacks it in training mode, as the published SSP code does: batch
            statistics are used, and running statistics move with each forward pass (`steps`,
            and one more per start where restarts > 1), as do other things that training mode
            turns on, dropout for one. Either way each module's own mode comes back exactly.
        early_stop: a sample that is misclassified at its start, or after a step, stays there: it
            leaves the batch, so that later steps cost less. No more samples are classified right
            afterwards than without it; the losses of those misclassified may be smaller. Exact to
            rounding: a convolution may sum otherwise in a smaller batch. Needs bn_mode "eval", and
            waits for the device after each step.
        graph: run all steps as one CUDA graph, captured at the first call and whenever something
            that matters has changed (`GraphCache` says what), else replayed: the same results,
            without the time of launching kernels from Python. Only for images on a CUDA device,
            and a model whose forward pass does not synchronize with the host.
        generator: random numbers of the start, on the device of x; torch's default if None.

    Returns:
        Attacked images of x's shape and dtype, detached: within eps of x (to rounding) and within
        `bounds`.

    Raises:
        TypeError: model is no Module, x is not floating point, or y not int64.
        ValueError: shapes or devices that do not fit; an unknown norm, loss or bn_mode; eps or
            step_size negative; steps or restarts below one; restarts without random starts; bounds
            reversed; early_stop with bn_mode "train" or with graph; graph on a device without
            CUDA; on the CPU, where looking costs no synchronization, also labels out of range and
            images outside the bounds.
    """
    steps_taken = Steps(norm, eps, step_size, steps, tuple(bounds))
    check_steps(steps_taken, bn_mode)
    loss_function = _check_loss(loss)
    _check_combination(restarts, random_start, bn_mode, early_stop, graph)
    check_tensors(model, x, y, steps_taken.bounds, generator)
    return attack(
        model,
        x,
        y,
        loss_function,
        steps_taken,
        _NOISE[norm] if random_start else None,
        restarts=restarts,
        bn_mode=bn_mode,
        early_stop=early_stop,
        graph=graph,
        generator=generator,
    )


def attack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    loss: AttackLoss,
    steps: Steps,
    start: Start | None,
    *,
    restarts: int = 1,
    bn_mode: str = "eval",
    early_stop: bool = False,
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`pgd` from any start on any target, its arguments not checked.

    Args:
        model: as in `pgd`, like all arguments not named here.
        x: images `[N, ...]`.
        target: what `loss` compares the logits with, `[N, ...]`; labels, where restarts > 1 or
            with early_stop.
        loss: from (logits `[N, num_classes]`, target) to losses `[N]`. With graph=True, one and
            the same function every time.
        steps: the steps, and what they are kept in.
        start: from (x, steps, generator) to perturbations of x's shape; none if None.
        restarts: number of starts.
        bn_mode: "eval" or "train".
        early_stop: misclassified samples leave the batch.
        graph: replay a CUDA graph of all steps.
        generator: random numbers of the start.
    """
    if len(x) == 0:
        return x.detach().clone()
    # The samples of a batch are independent in eval mode only; there, restarts share one batch.
    rounds, copies = (1, restarts) if bn_mode == "eval" else (restarts, 1)
    ascend = climb_in_graph if graph else climb_until_misclassified if early_stop else climb
    model = attacked_module(model)
    # Attacks run under torch.no_grad() and torch.inference_mode() too: they differentiate for
    # themselves. Inference tensors cannot be saved for backward, their copies can.
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, bn_mode):
        x, target = (t.clone() if t.is_inference() else t.detach() for t in (x, target))
        objective = Objective(model, loss)
        centre = torch.cat([x] * copies) if copies > 1 else x
        found = []
        for _ in range(rounds):
            if start is None:
                first = centre.clone()
            else:
                noise = torch.cat([start(x, steps, generator) for _ in range(copies)])
                first = (centre + noise).clamp_(*steps.bounds)
            found.append(ascend(objective, steps, first, centre, target))
        return found[0] if restarts == 1 else worst(objective, found, x, target)


def linf_noise(x: Tensor, steps: Steps, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball."""
    return torch.empty_like(x).uniform_(-steps.eps, steps.eps, generator=generator)


def l2_noise(x: Tensor, steps: Steps, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball: a uniform direction, and a radius whose d-th power is uniform."""
    direction = torch.empty_like(x).normal_(generator=generator).flatten(1)
    radius = x.new_empty(len(x), 1).uniform_(generator=generator) ** (1 / direction.shape[1])
    return (direction * (steps.eps * radius / direction.norm(dim=1, keepdim=True))).view_as(x)


_NOISE: dict[str, Start] = {"linf": linf_noise, "l2": l2_noise}


def check_steps(steps: Steps, bn_mode: str) -> None:
    """Names and numbers of an attack.

    Raises:
        TypeError, ValueError: as `pgd`.
    """
    for name, value, known in (("norm", steps.norm, NORMS), ("bn_mode", bn_mode, BN_MODES)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    for name, value in (("eps", steps.eps), ("step_size", steps.size)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    _check_count("steps", steps.count)
    bounds = steps.bounds
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _check_loss(loss: str | AttackLoss) -> AttackLoss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or a callable")
    return LOSSES[loss]


def _check_combination(
    restarts: int, random_start: bool, bn_mode: str, early_stop: bool, graph: bool
) -> None:
    _check_count("restarts", restarts)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts = {restarts} needs random_start: all starts would be the same")
    if early_stop and bn_mode == "train":
        raise ValueError("early_stop must go with bn_mode 'eval': 'train' couples the samples")
    if early_stop and graph:
        raise ValueError("early_stop must go without graph: the batch that is left changes size")


def check_tensors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    bounds: tuple[float, float],
    generator: torch.Generator | None,
) -> None:
    """Model, images and labels of an attack.

    Raises:
        TypeError, ValueError: as `pgd`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if y.dtype != torch.int64:
        raise TypeError(f"y must be int64, got {y.dtype}")
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x must be [N, C, ...] and y [N], got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"y must be on the device of x, got {y.device} and {x.device}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"generator must be on the device of x, got {generator.device} and {x.device}"
        )
    if x.device.type == "cpu" and x.numel():
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        if low < bounds[0] or high > bounds[1]:
            raise ValueError(f"x must lie within bounds {tuple(bounds)}, got {low} to {high}")
        if int(y.min()) < 0:
            raise ValueError(f"y must be labels from 0, got {int(y.min())}")
