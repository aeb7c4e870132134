"""Adversarial training with one gradient a step: FGSM-RS, N-FGSM, and Free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .ascent import Steps
from .attacks import attack, check_steps, check_tensors, cross_entropy_per_sample
from .losses import TrainingLoss, clean_loss, pgd_loss

Item = TypeVar("Item")
# FGSM-RS steps by so much of eps; N-FGSM draws noise in a ball so much larger than that of eps.
RS_STEP, NOISE = 1.25, 2.0


def fgsm_rs_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    label_smoothing: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingLoss:
    """FGSM-RS: cross-entropy after one signed step from a uniform point of the ball.

        d = U(-eps, eps);   d' = clip(d + alpha sign(grad CE(f(x + d), y)), -eps, eps)

    x + d and x + d' are clipped to the bounds. Source: Wong, Rice, Kolter, "Fast is better than
    free: Revisiting adversarial training", ICLR 2020.

    Args:
        model: as in `pgd_loss`, like all arguments not named here.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius of the l-infinity ball, in units of x.
        step_size: alpha, same units; 1.25 eps if None, as in the source.
        label_smoothing: of the loss; as in `clean_loss`.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train".
        graph: replay the attack as a CUDA graph.
        generator: random numbers of the start, on the device of x.

    Returns:
        As `clean_loss`, at x + d'.

    Raises:
        TypeError, ValueError: as `pgd`.
    """
    return pgd_loss(
        model,
        x,
        y,
        eps=eps,
        step_size=RS_STEP * eps if step_size is None else step_size,
        steps=1,
        label_smoothing=label_smoothing,
        bounds=bounds,
        bn_mode=bn_mode,
        graph=graph,
        generator=generator,
    )


def n_fgsm_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    noise: float = NOISE,
    label_smoothing: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    bn_mode: str = "eval",
    graph: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingLoss:
    """N-FGSM: cross-entropy after one signed step from a noisy image, with no ball to stay in.

        n = U(-k eps, k eps);   x' = x + n + alpha sign(grad CE(f(x + n), y))

    x + n and x' are clipped to the bounds, and to nothing else. Source: de Jorge, Bibi, Volpi,
    Sanyal, Torr, Rogez, Dokania, "Make Some Noise: Reliable and Efficient Single-Step Adversarial
    Training", NeurIPS 2022.

    Args:
        model: as in `pgd_loss`, like all arguments not named here.
        x: images `[N, C, H, W]` within `bounds`.
        y: labels `[N]`, int64.
        eps: radius trained for, in units of x.
        step_size: alpha, same units; eps if None, as in the source.
        noise: k.
        label_smoothing: of the loss; as in `clean_loss`.
        bounds: smallest and largest pixel value.
        bn_mode: "eval" or "train".
        graph: replay the attack as a CUDA graph.
        generator: random numbers of the noise, on the device of x.

    Returns:
        As `clean_loss`, at x'.

    Raises:
        TypeError, ValueError: as `pgd`; noise negative.
    """
    size = eps if step_size is None else step_size
    check_steps(Steps("linf", eps, size, 1, tuple(bounds)), bn_mode)
    check_tensors(model, x, y, tuple(bounds), generator)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative, got {noise}")

    def uniform(x: Tensor, _: Steps, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(x).uniform_(-noise * eps, noise * eps, generator=generator)

    unconfined = Steps("linf", math.inf, size, 1, tuple(bounds))
    x_adv = attack(
        model,
        x,
        y,
        cross_entropy_per_sample,
        unconfined,
        uniform,
        bn_mode=bn_mode,
        graph=graph,
        generator=generator,
    )
    return clean_loss(model, x_adv, y, label_smoothing=label_smoothing)


class FreeLoss:
    """Free adversarial training: one backward pass moves the parameters and the perturbation.

        loss = CE(f(clip(x + d)), y);   backward;   optimizer's step;   d = clip(d + alpha sign(dL/dd), -eps, eps)

    Called like a loss function, on the same batch `replays` times in a row (`replayed`). The
    backward pass of its loss, and nothing else, moves d, which is carried from call to call and
    from batch to batch; it begins at zero. Source: Shafahi et al., "Adversarial Training for
    Free!", NeurIPS 2019.

    A sample whose gradient is not finite keeps its d where that is not: under a GradScaler, such a
    step is skipped for the parameters too.

    Attributes:
        perturbation: d `[N, C, H, W]`, None before the first call. A smaller batch uses and moves
            its first rows; a larger one, or one of another shape, begins anew.

    Args:
        eps: radius of the l-infinity ball, in units of the images.
        step_size: alpha, same units; eps if None, as in the source.
        label_smoothing: of the loss; as in `clean_loss`.
        bounds: smallest and largest pixel value.

    Raises:
        TypeError, ValueError: as `pgd`.
    """

    def __init__(
        self,
        *,
        eps: float,
        step_size: float | None = None,
        label_smoothing: float = 0.0,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        size = eps if step_size is None else step_size
        self._steps = Steps("linf", eps, size, 1, tuple(bounds))
        check_steps(self._steps, "eval")
        self._label_smoothing = label_smoothing
        self.perturbation: Tensor | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> TrainingLoss:
        """The loss at the perturbed images, in the mode the model is in.

        Args:
            model: maps images to logits `[N, num_classes]`.
            x: images `[N, C, H, W]` within the bounds.
            y: labels `[N]`, int64.

        Raises:
            TypeError, ValueError: as `pgd`.
        """
        check_tensors(model, x, y, self._steps.bounds, None)
        kept = self.perturbation
        if kept is None or len(kept) < len(x) or kept.shape[1:] != x.shape[1:]:
            kept = torch.zeros_like(x)
        self.perturbation = kept.to(x.device)
        delta = self.perturbation[: len(x)].detach().requires_grad_()
        delta.register_hook(self._ascend)
        return clean_loss(
            model, (x + delta).clamp(*self._steps.bounds), y, label_smoothing=self._label_smoothing
        )

    @torch.no_grad()
    def _ascend(self, grad: Tensor) -> None:
        rows = self.perturbation[: len(grad)]
        step = torch.where(grad.isfinite(), grad.sign(), 0)
        eps = self._steps.eps
        rows.add_(step, alpha=self._steps.size).clamp_(-eps, eps)

    def state_dict(self) -> dict[str, Any]:
        """The perturbation."""
        kept = self.perturbation
        return {"perturbation": None if kept is None else kept.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the perturbation that `state_dict` returned."""
        self.perturbation = state["perturbation"]


def replayed(items: Iterable[Item], replays: int, start: int = 0) -> Iterator[Item]:
    """Each item several times in a row, as `FreeLoss` wants its batches.

    Args:
        items: the batches.
        replays: how often each is yielded.
        start: how often the first one has been before; it is yielded `replays` - `start` times.

    Returns:
        An iterator over the items.
    """
    for index, item in enumerate(items):
        for _ in range(start if index == 0 else 0, replays):
            yield item
