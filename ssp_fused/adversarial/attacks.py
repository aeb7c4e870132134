"""Gradient attacks on images: FGSM and PGD, in l-infinity and l2.

Sources: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015
(FGSM); Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018
(PGD); Carlini, Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017 (the margin
loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

from .. import functional

AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits `[N, K]`, labels `[N]` -> `[N]`."""
    return torch_functional.cross_entropy(logits, y, reduction="none")


def margin_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit less the true one: logits `[N, K]`, labels `[N]` -> `[N]`.

    Positive exactly where the sample is misclassified (Carlini and Wagner 2017, f_6 without its
    floor). Its gradient does not vanish where the softmax saturates.
    """
    true = logits.gather(1, y.unsqueeze(1))
    wrong = logits.scatter(1, y.unsqueeze(1), -math.inf).amax(dim=1)
    return wrong - true.squeeze(1)


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy_per_sample, "margin": margin_per_sample}
_STEPS = {"linf": functional.linf_step, "l2": functional.l2_step}
NORMS = tuple(_STEPS)
BN_MODES = ("eval", "train")


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent of the loss within a ball around x.

    Each step is `ssp_fused.functional.linf_step` or `l2_step`: step, projection onto the ball and
    clipping to the bounds. Only input gradients are computed: the parameters are frozen while the
    attack runs and get their `requires_grad` back afterwards, after an exception too; gradients
    in `.grad` are not touched. Not for a model that other threads use meanwhile.

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
        generator: random numbers of the start, on the device of x; torch's default if None.

    Returns:
        Attacked images of x's shape and dtype, detached: within eps of x (to rounding) and within
        `bounds`.

    Raises:
        TypeError: model is no Module, x is not floating point, or y not int64.
        ValueError: shapes or devices that do not fit; an unknown norm, loss or bn_mode; eps or
            step_size negative; steps or restarts below one; restarts without random starts; bounds
            reversed; on the CPU, where looking costs no synchronization, also labels out of range
            and images outside the bounds.
    """
    loss_function = _check_choices(norm, loss, bn_mode)
    _check_numbers(eps, step_size, steps, restarts, random_start, bounds)
    _check_tensors(model, x, y, bounds, generator)
    if len(x) == 0:
        return x.detach().clone()
    # The samples of a batch are independent in eval mode only; there, restarts share one batch.
    rounds, copies = (1, restarts) if bn_mode == "eval" else (restarts, 1)
    # Attacks run under torch.no_grad() and torch.inference_mode() too: they differentiate for
    # themselves. Inference tensors cannot be saved for backward, their copies can.
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, bn_mode):
        x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
        objective = _Objective(model, y, loss_function)
        step = _STEPS[norm]
        found = []
        for _ in range(rounds):
            centre = torch.cat([x] * copies) if copies > 1 else x
            if random_start:
                noise = torch.cat([_NOISE[norm](x, eps, generator) for _ in range(copies)])
                x_adv = (centre + noise).clamp_(*bounds)
            else:
                x_adv = centre.clone()
            for _ in range(steps):
                grad = objective.input_gradient(x_adv)
                x_adv = step(x_adv, grad, centre, step_size=step_size, eps=eps, bounds=bounds)
            found.append(x_adv)
        return found[0] if restarts == 1 else _worst(objective, found, x, restarts)


@contextmanager
def attack_mode(model: nn.Module, bn_mode: str) -> Iterator[None]:
    """Within it no parameter requires a gradient and the model is in eval or training mode.

    Afterwards, also after an exception, `requires_grad` of each parameter and `training` of each
    module are what they were.

    Args:
        model: the model to attack.
        bn_mode: "eval" or "train".
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.train(bn_mode == "train")
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


class _Objective:
    """The per-sample losses that an attack climbs, for batches of whole copies of the labels."""

    def __init__(self, model: nn.Module, y: Tensor, loss: AttackLoss) -> None:
        self.model = model
        self.y = y
        self.loss = loss

    def input_gradient(self, x_adv: Tensor) -> Tensor:
        """Gradient of the summed losses at x_adv `[copies * N, ...]`."""
        leaf = x_adv.detach().requires_grad_()
        losses, _ = self(leaf)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return grad

    def __call__(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and logits, `[copies * N]` and `[copies * N, num_classes]`."""
        logits = self.model(x_adv)
        count = len(self.y)
        if logits.dim() != 2 or len(logits) != len(x_adv):
            raise ValueError(
                f"model must return logits [N, num_classes] with N = {len(x_adv)}, "
                f"got shape {tuple(logits.shape)}"
            )
        if self.y.device.type == "cpu" and int(self.y.max()) >= logits.shape[1]:
            raise ValueError(
                f"y must be labels below num_classes = {logits.shape[1]}, got {int(self.y.max())}"
            )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        # A callable may hold tensors of N rows (clean logits, say), so it sees N rows at a time.
        parts = [self.loss(part, self.y) for part in logits.split(count)]
        for part in parts:
            if part.shape != self.y.shape:
                raise ValueError(
                    f"loss must return one value per sample, shape {tuple(self.y.shape)}, got "
                    f"{tuple(part.shape)}"
                )
        return torch.cat(parts) if len(parts) > 1 else parts[0], logits


@torch.no_grad()
def _worst(objective: _Objective, found: list[Tensor], x: Tensor, restarts: int) -> Tensor:
    """Each sample's worst among its restarts: misclassified before not, then the largest loss."""
    scores, wrong = [], []
    for x_adv in found:
        losses, logits = objective(x_adv)
        scores.append(losses.view(-1, len(x)))
        wrong.append(logits.argmax(dim=1).view(-1, len(x)) != objective.y)
    score, fooled = torch.cat(scores), torch.cat(wrong)
    score = score.masked_fill(fooled.any(dim=0) & ~fooled, -math.inf)
    row = score.argmax(dim=0) * len(x) + torch.arange(len(x), device=x.device)
    return torch.empty_like(x).copy_(torch.cat(found)[row])


def _linf_noise(x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(x).uniform_(-eps, eps, generator=generator)


def _l2_noise(x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball: a uniform direction, and a radius whose d-th power is uniform."""
    direction = torch.empty_like(x).normal_(generator=generator).flatten(1)
    radius = x.new_empty(len(x), 1).uniform_(generator=generator) ** (1 / direction.shape[1])
    return (direction * (eps * radius / direction.norm(dim=1, keepdim=True))).view_as(x)


_NOISE = {"linf": _linf_noise, "l2": _l2_noise}


def _check_choices(norm: str, loss: str | AttackLoss, bn_mode: str) -> AttackLoss:
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")
    if bn_mode not in BN_MODES:
        raise ValueError(f"unknown bn_mode {bn_mode!r}; known: {', '.join(BN_MODES)}")
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or a callable")
    return LOSSES[loss]


def _check_numbers(
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    random_start: bool,
    bounds: tuple[float, float],
) -> None:
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    for name, count in (("steps", steps), ("restarts", restarts)):
        if not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts = {restarts} needs random_start: all starts would be the same")
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {tuple(bounds)}")


def _check_tensors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    bounds: tuple[float, float],
    generator: torch.Generator | None,
) -> None:
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
