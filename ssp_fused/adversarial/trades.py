"""Losses that weigh a network's change under attack: TRADES and MART."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .ascent import Steps, attack_mode, attacked_module, full_precision
from .attacks import attack, check_steps, check_tensors, pgd
from .losses import TrainingLoss

# TRADES starts its attack here, in units of pixels in [0, 1]: at x itself the divergence is zero,
# and so is its gradient.
_START_DEVIATION = 1e-3


def divergence_per_sample(logits: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each sample: logits and log p `[N, K]` -> `[N]`."""
    log_q = functional.log_softmax(logits, dim=1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def trades_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingLoss:
    """TRADES: cross-entropy on the images, and how far an attack moves the prediction.

        mean( CE(f(x), y) ) + beta mean( KL( p(x) || p(x') ) ),   p = softmax f
        x' = argmax KL( p(x) || p(x') ) within eps of x, in l-infinity: PGD from x + 0.001 N(0, 1)

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between
    Robustness and Accuracy", ICML 2019 (beta is its 1 / lambda). Within the attack, p(x) is that of
    the mode `bn_mode`; the loss is taken in the mode the model is in, x before x'.

    Args:
        model: maps images to logits `[N, num_classes]`; called twice before the backward pass.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius of the attack, in units of x.
        step_size: length of one step, same units.
        steps: number of steps.
        beta: weight of the divergence.
        label_smoothing: of the cross-entropy; as in `clean_loss`.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train"; in "train", running statistics move once more, for p(x).
        graph: replay the attack as a CUDA graph.
        generator: random numbers of the start, on the device of x.

    Returns:
        The loss, and the logits at x'.

    Raises:
        TypeError, ValueError: as `pgd`.
    """
    taken = Steps("linf", eps, step_size, steps, tuple(bounds))
    check_steps(taken, bn_mode)
    check_tensors(model, x, y, taken.bounds, generator)
    inner = attacked_module(model)
    with attack_mode(inner, bn_mode), torch.no_grad():
        log_p = functional.log_softmax(full_precision(inner(x)), dim=1)
    x_adv = attack(
        model,
        x,
        log_p,
        divergence_per_sample,
        taken,
        _gaussian_noise,
        bn_mode=bn_mode,
        graph=graph,
        generator=generator,
    )
    logits, attacked = full_precision(model(x)), full_precision(model(x_adv))
    natural = functional.cross_entropy(logits, y, label_smoothing=label_smoothing)
    moved = divergence_per_sample(attacked, functional.log_softmax(logits, dim=1)).mean()
    return TrainingLoss(natural + beta * moved, attacked.detach())


def _gaussian_noise(x: Tensor, _: Steps, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(x).normal_(std=_START_DEVIATION, generator=generator)


def mart_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    beta: float = 5.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingLoss:
    """MART: a margin on PGD examples, and the change under attack of what is misclassified.

        mean( BCE(p(x'), y) + beta KL( p(x) || p(x') ) (1 - p_y(x)) ),   p = softmax f
        BCE(p, y) = -log p_y - log( 1 - max_{k != y} p_k )

    Source: Wang, Zou, Yi, Bailey, Ma, Gu, "Improving Adversarial Robustness Requires Revisiting
    Misclassified Examples", ICLR 2020 (beta is its lambda). x' is `pgd`'s. The loss is taken in the
    mode the model is in, x before x'.

    Args:
        model: maps images to logits `[N, num_classes]`, two classes or more; called twice before
            the backward pass.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius of the l-infinity attack, in units of x.
        step_size: length of one step, same units.
        steps: number of steps.
        beta: weight of the divergence.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train".
        graph: replay the attack as a CUDA graph.
        generator: random numbers of the start, on the device of x.

    Returns:
        The loss, and the logits at x'.

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
        bounds=bounds,
        bn_mode=bn_mode,
        graph=graph,
        generator=generator,
    )
    logits, attacked = full_precision(model(x)), full_precision(model(x_adv))
    log_p = functional.log_softmax(logits, dim=1)
    doubt = 1 - log_p.gather(1, y.unsqueeze(1)).squeeze(1).exp()
    moved = divergence_per_sample(attacked, log_p) * doubt
    loss = (boosted_cross_entropy_per_sample(attacked, y) + beta * moved).mean()
    return TrainingLoss(loss, attacked.detach())


def boosted_cross_entropy_per_sample(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y - log(1 - max_{k != y} p_k): logits `[N, K]`, labels `[N]` -> `[N]`.

    1 - p_k is the sum of the other probabilities, whose logarithm is exact where p_k is near 1.
    """
    true = y.unsqueeze(1)
    largest_wrong = logits.detach().scatter(1, true, -torch.inf).argmax(dim=1, keepdim=True)
    total = logits.logsumexp(dim=1)
    others = logits.scatter(1, largest_wrong, -torch.inf).logsumexp(dim=1)
    return (total - logits.gather(1, true).squeeze(1)) + (total - others)
