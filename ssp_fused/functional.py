"""The fused operations as differentiable functions.

Activations are ``[N, C, *spatial]`` with any number of spatial dimensions from 0, in any strides; contiguous and
channels-last tensors are used as they are. Results are channels-last if any term is, else contiguous. Gradients of
gradients (``create_graph=True``) work, by plain PyTorch. Which implementation runs is chosen by
``ssp_fused.use_backend``; what each computes is written down in ``ssp_fused.reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _autograd, _checks, reference
from ._backends import Backend, select
from ._backends.reference import BACKEND as _REFERENCE
from ._layout import stage_dtype
from .reference import Coefficients

__all__ = [
    "l2_step",
    "linf_step",
    "stage_batch_norm_act",
    "stage_combine",
    "stage_group_norm_act",
]

_COMBINE_OPS = ("stage_combine", "channel_sum", "stage_dots")
_BATCH_NORM_OPS = (
    *_COMBINE_OPS,
    "stage_moments",
    "stage_norm_act",
    "stage_batch_norm_act",
    "update_running_stats_",
    "norm_act_backward_reduce",
    "norm_act_backward",
    "batch_norm_act_backward",
)
_GROUP_NORM_OPS = (*_COMBINE_OPS, "stage_group_norm_act", "group_norm_act_backward")
BLOCK_OPS = tuple(dict.fromkeys((*_BATCH_NORM_OPS, *_GROUP_NORM_OPS)))


def stage_combine(
    terms: Sequence[Tensor], coefficients: Coefficients, *, channel_bias: Tensor | None = None
) -> Tensor:
    """u = sum_k c_k t_k + channel_bias: one stage of a Runge-Kutta step in Shu-Osher form.

    Args:
        terms: One to six activations ``[N, C, *spatial]`` of one shape and device; float32 may be mixed with
            float16 or bfloat16 (u is float32 then).
        coefficients: One number a term, or a 1-D tensor of them, whose gradient is then returned.
        channel_bias: ``[C]``, added to every position of a channel.

    Returns:
        u, of the terms' shape and common dtype; never an alias of a term.

    Raises:
        ValueError: Shapes, devices or counts do not fit.
        TypeError: A tensor is not floating point, or the dtypes must not be mixed.
        RuntimeError: The chosen backend cannot serve the call.
    """
    terms, backend = _stage(terms, coefficients, channel_bias, _COMBINE_OPS)
    if backend is _REFERENCE:
        return reference.combine(terms, coefficients, channel_bias)
    numbers, tensor = _split(coefficients)
    with _autocast.disabled(terms[0]):
        return _autograd.StageCombine.apply(
            _autograd.Stage(backend, numbers), tensor, channel_bias, *terms
        )


def stage_batch_norm_act(
    terms: Sequence[Tensor],
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    channel_bias: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """u = sum_k c_k t_k + channel_bias and z = act(batch_norm(u)), in one go.

    With ``training`` the batch's own mean and biased variance normalize, and the running statistics, where given,
    move by ``momentum`` towards them (with the unbiased variance), as in ``torch.nn.functional.batch_norm``.

    Args:
        terms: As in :func:`stage_combine`.
        coefficients: As in :func:`stage_combine`.
        weight: ``[C]`` or None; multiplies the normalized values.
        bias: ``[C]`` or None; added to them.
        running_mean: ``[C]``; may be None in training.
        running_var: ``[C]``; may be None in training.
        channel_bias: As in :func:`stage_combine`.
        training: Whether the batch's statistics are used.
        momentum: Weight of the new statistics in the running ones.
        eps: Added to the variance.
        activation: "relu", "leaky_relu" (slope 0.01), "silu" or "identity".
        process_group: Where given, the statistics are those of the batch over all its ranks
            (``torch.distributed``); None means of this process alone.

    Returns:
        ``(u, z)``, in the terms' shape. z has u's dtype, or autocast's where autocast is on.

    Raises:
        ValueError: As :func:`stage_combine`; an unknown activation; eps < 0; running statistics missing without
            ``training``; one value per channel only with it.
        TypeError: As :func:`stage_combine`.
        RuntimeError: The chosen backend cannot serve the call.
    """
    u, z = batch_norm_act(
        terms,
        coefficients,
        weight,
        bias,
        running_mean,
        running_var,
        channel_bias=channel_bias,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        process_group=process_group,
        write_u=True,
    )
    assert u is not None
    return u, z


def batch_norm_act(
    terms: Sequence[Tensor],
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    channel_bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    process_group: Any,
    write_u: bool,
    num_batches_tracked: Tensor | None = None,
    updates: int = 1,
) -> tuple[Tensor | None, Tensor]:
    """:func:`stage_batch_norm_act` for layers: u may stay unwritten, and one use may count as several.

    ``write_u=False`` takes a single term with coefficient 1. ``momentum=None`` averages all batches so far, by
    ``num_batches_tracked``. ``updates`` is how often the running statistics take this batch in.
    """
    code = _checks.activation_index(activation)
    _checks.epsilon(eps)
    terms, backend = _stage(terms, coefficients, channel_bias, _BATCH_NORM_OPS)
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        _checks.channel_vector(name, vector, terms[0])
    if training:
        if process_group is None:
            _checks.batch_statistics(terms[0].shape)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given where training is False")

    if backend is _REFERENCE and process_group is None and num_batches_tracked is None:
        u = reference.combine(terms, coefficients, channel_bias)
        for _ in range(updates):
            z = reference.batch_norm_act(
                u,
                running_mean,
                running_var,
                weight,
                bias,
                training=training,
                momentum=momentum or 0.0,  # None only where nothing is tracked
                eps=eps,
                activation=code,
            )
        return u, z

    numbers, tensor = _split(coefficients)
    stage = _autograd.Stage(backend, numbers, write_u)
    norm = _autograd.Norm(
        eps,
        code,
        _autocast.convolution_dtype(terms),
        process_group=process_group if training else None,
    )
    with _autocast.disabled(terms[0]):
        if not training:
            mean, rstd = _autograd.fixed_statistics(
                running_mean, running_var, eps, stage_dtype(terms)
            )
            return _autograd.StageFixedNormAct.apply(
                stage, norm, mean, rstd, tensor, channel_bias, weight, bias, *terms
            )
        u, z, mean, variance, count = _autograd.StageBatchNormAct.apply(
            stage, norm, tensor, channel_bias, weight, bias, *terms
        )
        if running_mean is not None or running_var is not None or num_batches_tracked is not None:
            if not write_u and channel_bias is not None:
                mean = mean + channel_bias.detach().to(mean.dtype)
            backend.ops.update_running_stats_(
                running_mean,
                running_var,
                num_batches_tracked,
                mean.expand(updates, -1),
                variance.expand(updates, -1),
                float(terms[0].numel() // max(terms[0].shape[1], 1)),
                count,
                momentum,
            )
    return u, z


def stage_group_norm_act(
    terms: Sequence[Tensor],
    coefficients: Coefficients,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    channel_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """u = sum_k c_k t_k + channel_bias and z = act(group_norm(u)), in one go.

    Args:
        terms: As in :func:`stage_combine`.
        coefficients: As in :func:`stage_combine`.
        num_groups: Divides C; C of them is instance normalization.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        channel_bias: As in :func:`stage_combine`.
        eps: Added to the variance.
        activation: As in :func:`stage_batch_norm_act`.

    Returns:
        ``(u, z)``, as :func:`stage_batch_norm_act`.

    Raises:
        ValueError: As :func:`stage_combine`; ``num_groups`` does not divide C; an unknown activation; eps < 0.
        TypeError: As :func:`stage_combine`.
        RuntimeError: The chosen backend cannot serve the call.
    """
    u, z = group_norm_act(
        terms,
        coefficients,
        num_groups,
        weight,
        bias,
        channel_bias=channel_bias,
        eps=eps,
        activation=activation,
        write_u=True,
    )
    assert u is not None
    return u, z


def group_norm_act(
    terms: Sequence[Tensor],
    coefficients: Coefficients,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    channel_bias: Tensor | None,
    eps: float,
    activation: str,
    write_u: bool,
) -> tuple[Tensor | None, Tensor]:
    """:func:`stage_group_norm_act` for layers: u may stay unwritten (a single term with coefficient 1)."""
    code = _checks.activation_index(activation)
    _checks.epsilon(eps)
    terms, backend = _stage(terms, coefficients, channel_bias, _GROUP_NORM_OPS)
    _checks.groups(num_groups, terms[0])
    for name, vector in (("weight", weight), ("bias", bias)):
        _checks.channel_vector(name, vector, terms[0])
    if backend is _REFERENCE:
        u = reference.combine(terms, coefficients, channel_bias)
        return u, reference.group_norm_act(u, num_groups, weight, bias, eps=eps, activation=code)
    numbers, tensor = _split(coefficients)
    norm = _autograd.Norm(eps, code, _autocast.convolution_dtype(terms), num_groups=num_groups)
    with _autocast.disabled(terms[0]):
        return _autograd.StageGroupNormAct.apply(
            _autograd.Stage(backend, numbers, write_u),
            norm,
            tensor,
            channel_bias,
            weight,
            bias,
            *terms,
        )


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One step of an attack in the max norm: clip(project(x_adv + step_size * sign(grad))).

    Args:
        x_adv: The current adversarial images, any shape.
        grad: Gradient of the loss to be increased, of ``x_adv``'s shape and dtype.
        x: The clean images, around which the ball of radius ``eps`` is projected on.
        step_size: In units of pixel values.
        eps: Radius of the ball, in units of pixel values.
        bounds: ``(low, high)`` of valid pixels.

    Returns:
        A new tensor; not differentiable.

    Raises:
        ValueError: Shapes or devices differ, ``eps`` is negative, ``bounds`` are reversed.
        TypeError: Dtypes differ or are not floating point.
        RuntimeError: The chosen backend cannot serve the call.
    """
    return _attack_step("linf_step", x_adv, grad, x, step_size, eps, bounds)


def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One step of an attack in the Euclidean norm, sample by sample (dimension 0).

    clip(project(x_adv + step_size * grad / ||grad||)); a zero gradient moves nothing.

    Args:
        x_adv: As in :func:`linf_step`, like all that follow; dimension 0 is that of the samples.
        grad: Gradient of the loss to be increased.
        x: The clean images.
        step_size: Euclidean length of a sample's step, in units of pixel values.
        eps: Euclidean radius of the ball, in units of pixel values.
        bounds: ``(low, high)`` of valid pixels.

    Returns:
        A new tensor; not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`linf_step`.
    """
    return _attack_step("l2_step", x_adv, grad, x, step_size, eps, bounds)


def _attack_step(
    op: str,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    bounds: tuple[float, float],
) -> Tensor:
    _checks.attack_step(x_adv, grad, x, eps, bounds)
    backend = select((op,), (x_adv, grad, x))
    with torch.no_grad():
        step = getattr(backend.ops, op)
        return step(x_adv, grad, x, float(step_size), float(eps), *map(float, bounds))


def _stage(
    terms: Sequence[Tensor],
    coefficients: Coefficients,
    channel_bias: Tensor | None,
    ops: Sequence[str],
) -> tuple[list[Tensor], Backend]:
    _checks.terms(terms, coefficients)
    _checks.channel_vector("channel_bias", channel_bias, terms[0])
    return list(terms), select(ops, terms)


def _split(coefficients: Coefficients) -> tuple[tuple[float, ...] | None, Tensor | None]:
    """The coefficients as numbers, or as a tensor."""
    if isinstance(coefficients, Tensor):
        return None, coefficients
    return tuple(float(c) for c in coefficients), None
