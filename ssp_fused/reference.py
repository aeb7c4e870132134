"""The specification: every op, step and block in plain PyTorch, in the notation of the paper and the kernels.

First half: the ops, with the names, arguments and results of ``_ops.SCHEMAS`` (see there for the conventions).
Arithmetic is done in the statistics dtype (fp32, or fp64 for fp64) and rounded once to the result's dtype; what
is normalized is the stage as stored. Second half: the differentiable functions behind the ``reference`` backend,
which leave normalization to torch.nn.functional.

    u    = sum_k c_k t_k + channel_bias                     stage
    xhat = (u - mean) * rstd                                normalized
    y    = gamma * xhat + beta,   z = act(y)
    dy   = scale * dz * act'(y)
    du   = gamma * rstd * (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) + sum_j e_j extra_j
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import common_rows, dense, is_rows, mask_shape, stage_dtype, statistics_dtype
from ._ops import ACTIVATIONS, LEAKY_RELU_SLOPE
from .schemes import ShuOsher

Coefficients = Sequence[float] | Tensor


# --- pieces -----------------------------------------------------------------------------------------------------


def activate(y: Tensor, activation: int) -> Tensor:
    """z = act(y); NaN stays NaN."""
    match ACTIVATIONS[activation]:
        case "identity":
            return y
        case "relu":
            return torch.where(y <= 0, torch.zeros_like(y), y)
        case "leaky_relu":
            return torch.where(y <= 0, LEAKY_RELU_SLOPE * y, y)
        case _:
            return y / (1 + torch.exp(-y))


def activation_backward(dz: Tensor, y: Tensor, activation: int) -> Tensor:
    """dz * act'(y)."""
    if ACTIVATIONS[activation] == "silu":
        sigmoid = torch.sigmoid(y)
        return dz * (sigmoid * (1 + y * (1 - sigmoid)))
    return masked(dz, ~(y <= 0), activation)


def masked(dz: Tensor, positive: Tensor, activation: int) -> Tensor:
    """dz * act'(y) of a piecewise linear activation, from ``positive = not (y <= 0)``."""
    match ACTIVATIONS[activation]:
        case "identity":
            return dz
        case "relu":
            return torch.where(positive, dz, torch.zeros_like(dz))
        case _:
            return torch.where(positive, dz, LEAKY_RELU_SLOPE * dz)


def pack_mask(positive: Tensor, rows: bool) -> Tensor:
    """The 1-bit form of a boolean activation mask (see ``_layout.mask_shape``)."""
    shape = mask_shape(positive.shape, rows)
    runs = positive.movedim(1, -1) if rows else positive
    length = positive.shape[1] if rows else math.prod(positive.shape[2:])
    runs = runs.reshape(*shape[:-1], length)
    runs = F.pad(runs.to(torch.uint8), (0, 8 * shape[-1] - length))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=runs.device)
    return (runs.view(*shape, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean activation mask of an activation of ``shape``."""
    n, c, *spatial = shape
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    runs = ((mask.unsqueeze(-1) >> bits) & 1).flatten(-2).bool()
    if mask.dim() == 2:
        return runs[:, :c].reshape(n, *spatial, c).movedim(-1, 1)
    return runs[..., : math.prod(spatial)].reshape(n, c, *spatial)


def _per_channel(vector: Tensor | None, like: Tensor, default: float) -> Tensor | float:
    """A vector over channels (or a [N, C] table) shaped to broadcast against ``like``, in its dtype."""
    if vector is None:
        return default
    vector = vector.to(like.dtype)
    lead = vector.shape if vector.dim() == 2 else (1, *vector.shape)
    return vector.reshape(*lead, *[1] * (like.dim() - 2))


def _sum_channels(value: Tensor) -> Tensor:
    return value.sum([0, *range(2, value.dim())])


def _numbers(values: Coefficients | float, tensor: Tensor | None) -> Coefficients | float:
    return values if tensor is None else tensor


def _weighted_sum(
    terms: Sequence[Tensor], coefficients: Coefficients, dtype: torch.dtype
) -> Tensor:
    total = coefficients[0] * terms[0].to(dtype)
    for k in range(1, len(terms)):
        total = total + coefficients[k] * terms[k].to(dtype)
    return total


def combine(
    terms: Sequence[Tensor], coefficients: Coefficients, channel_bias: Tensor | None = None
) -> Tensor:
    """u = sum_k c_k t_k + channel_bias, rounded to the terms' common dtype; differentiable in all of them."""
    dtype = stage_dtype(terms)
    arithmetic = statistics_dtype(dtype)
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.to(arithmetic)
    u = _weighted_sum(terms, coefficients, arithmetic)
    if channel_bias is not None:
        u = u + _per_channel(channel_bias, u, 0.0)
    return dense(u.to(dtype), common_rows(terms))


def _xhat(u: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    u = u.to(statistics_dtype(u.dtype))
    return (u - _per_channel(mean, u, 0.0)) * _per_channel(rstd, u, 1.0)


def _affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    return xhat * _per_channel(gamma, xhat, 1.0) + _per_channel(beta, xhat, 0.0)


def _by_channel(table: Tensor, channels: int) -> Tensor:
    """[N, num_groups] -> [N, C]."""
    return table.repeat_interleave(channels // table.shape[1], dim=1)


def _wanted(value: Tensor, wanted: bool) -> Tensor:
    return value if wanted else value.new_empty(0)


# --- the ops ----------------------------------------------------------------------------------------------------


def stage_combine(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
) -> Tensor:
    """u."""
    return combine(terms, _numbers(coefficients, coefficient_tensor), channel_bias)


def stage_moments(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, and mean and biased variance of u over all but the channels."""
    u = stage_combine(terms, coefficients, coefficient_tensor, channel_bias)
    mean, variance = _moments(u.to(statistics_dtype(u.dtype)))
    return _wanted(u, write_u), mean, variance


def _moments(u: Tensor) -> tuple[Tensor, Tensor]:
    if u.numel() == 0:
        return u.new_zeros(u.shape[1]), u.new_zeros(u.shape[1])
    variance, mean = torch.var_mean(u, [0, *range(2, u.dim())], correction=0)
    return mean, variance


def stage_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
    write_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, z = act(gamma * xhat + beta) with statistics given, and the mask not (y <= 0)."""
    u = stage_combine(terms, coefficients, coefficient_tensor, channel_bias)
    y = _affine(_xhat(u, mean, rstd), gamma, beta)
    mask = pack_mask(~(y <= 0), is_rows(u)) if write_mask else u.new_empty(0, dtype=torch.uint8)
    z = activate(y, activation).to(z_dtype or u.dtype)
    return _wanted(u, write_u), dense(z, is_rows(u)), mask


def stage_batch_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, z, mean, biased variance, rstd: ``stage_moments`` then ``stage_norm_act``."""
    stage = (terms, coefficients, coefficient_tensor, channel_bias)
    u, mean, variance = stage_moments(*stage, True)
    rstd = (variance + eps).rsqrt()
    _, z, _ = stage_norm_act(*stage, mean, rstd, gamma, beta, activation, z_dtype, False, False)
    return _wanted(u, write_u), z, mean, variance, rstd


def stage_group_norm_act(
    terms: Sequence[Tensor],
    coefficients: Sequence[float],
    coefficient_tensor: Tensor | None,
    channel_bias: Tensor | None,
    num_groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    z_dtype: torch.dtype | None,
    write_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, z, and mean and rstd of each sample and group, ``[N, num_groups]``."""
    u = stage_combine(terms, coefficients, coefficient_tensor, channel_bias)
    n, c = u.shape[:2]
    value = u.to(statistics_dtype(u.dtype))
    grouped = value.reshape(n, num_groups, c // num_groups * math.prod(u.shape[2:]))
    # As the mean of squares: var_mean warns of a sample without elements.
    mean = grouped.mean(2)
    variance = (grouped - mean[..., None]).square().mean(2)
    rstd = (variance + eps).rsqrt()
    y = _affine(_xhat(u, _by_channel(mean, c), _by_channel(rstd, c)), gamma, beta)
    z = dense(activate(y, activation).to(z_dtype or u.dtype), is_rows(u))
    return _wanted(u, write_u), z, mean, rstd


def update_running_stats_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    means: Tensor,
    variances: Tensor,
    count: float,
    count_tensor: Tensor | None,
    momentum: float | None,
) -> None:
    """running = (1 - f) running + f batch, for each of K uses in order; variance unbiased.

    f is momentum, or 1 / num_batches_tracked where it is None. An empty batch is only counted.
    """
    counts = means.new_tensor(count) if count_tensor is None else count_tensor.to(means.dtype)
    for mean, variance in zip(means, variances, strict=True):
        factor = torch.as_tensor(0.0 if momentum is None else momentum, dtype=means.dtype)
        if num_batches_tracked is not None:
            num_batches_tracked += 1
            if momentum is None:
                factor = 1 / num_batches_tracked.to(means.dtype)
        unbiased = variance * (counts / (counts - 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                value = running.to(means.dtype)
                value = torch.where(counts > 0, (1 - factor) * value + factor * batch, value)
                running.copy_(value)


def _dy(
    dz: Tensor,
    scale: float | Tensor,
    xhat: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
) -> Tensor:
    y = _affine(xhat, gamma, beta)
    return activation_backward(scale * dz.to(xhat.dtype), y, activation)


def _recompute_z(
    dz: Tensor,
    u: Tensor,
    xhat: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    wanted: bool,
) -> Tensor:
    if not wanted:
        return dz.new_empty(0)
    return dense(activate(_affine(xhat, gamma, beta), activation).to(dz.dtype), is_rows(u))


def norm_act_backward_reduce(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum dy and sum dy * xhat over all but the channels, and z again."""
    xhat = _xhat(u, mean, rstd)
    dy = _dy(dz, _numbers(scale, scale_tensor), xhat, gamma, beta, activation)
    z = _recompute_z(dz, u, xhat, gamma, beta, activation, write_z)
    return _sum_channels(dy), _sum_channels(dy * xhat), z


def norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
    count_tensor: Tensor | None,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    du_dtype: torch.dtype | None,
) -> Tensor:
    """du = gamma * rstd * (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) + sum_j e_j extra_j.

    Without sums (fixed statistics) du = gamma * rstd * dy + ...; dy by the mask where one is given instead of u.
    """
    dtype = du_dtype or (dz.dtype if u is None else u.dtype)
    arithmetic = statistics_dtype(dtype)
    factor = _numbers(scale, scale_tensor)
    if mask is not None:
        rows = mask.dim() == 2
        dy = masked(factor * dz.to(arithmetic), unpack_mask(mask, dz.shape), activation)
    elif u is not None:
        rows = is_rows(u)
        xhat = _xhat(u, mean, rstd)
        dy = _dy(dz, factor, xhat, gamma, beta, activation)
    else:  # identity, fixed statistics: nothing to remember
        rows, dy = is_rows(dz), factor * dz.to(arithmetic)
    if sum_dy is not None:
        m = _numbers(count, count_tensor)
        dy = dy - _per_channel(sum_dy / m, dy, 0.0) - xhat * _per_channel(sum_dy_xhat / m, dy, 0.0)
    du = _per_channel(gamma, dy, 1.0) * _per_channel(rstd, dy, 1.0) * dy
    du = _add_extras(du, extras, _numbers(extra_coefficients, extra_coefficient_tensor))
    return dense(du.to(dtype), rows)


def _add_extras(du: Tensor, extras: Sequence[Tensor], coefficients: Coefficients) -> Tensor:
    return du + _weighted_sum(extras, coefficients, du.dtype) if extras else du


def batch_norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du, sum dy, sum dy * xhat, z: ``norm_act_backward_reduce`` then ``norm_act_backward``."""
    norm = (u, mean, rstd, gamma, beta, activation)
    sum_dy, sum_dy_xhat, z = norm_act_backward_reduce(dz, scale, scale_tensor, *norm, write_z)
    du = norm_act_backward(
        dz,
        scale,
        scale_tensor,
        u,
        None,
        *norm[1:],
        sum_dy,
        sum_dy_xhat,
        max(u.numel() // max(u.shape[1], 1), 1),
        None,
        extras,
        extra_coefficients,
        extra_coefficient_tensor,
        None,
    )
    return du, sum_dy, sum_dy_xhat, z


def group_norm_act_backward(
    dz: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    u: Tensor,
    channel_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: int,
    extras: Sequence[Tensor],
    extra_coefficients: Sequence[float],
    extra_coefficient_tensor: Tensor | None,
    write_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """du, dgamma, dbeta, the per-channel sum of du before the extras, and z again.

    ``u`` is the stage before ``channel_bias`` was added, where one is given. Sums run over a sample's group:
    du = rstd * (gamma * dy - sum(gamma * dy) / m - xhat * sum(gamma * dy * xhat) / m) + sum_j e_j extra_j.
    """
    rows, dtype = is_rows(u), u.dtype
    if channel_bias is not None:
        u = combine((u,), (1.0,), channel_bias)
    n, c = u.shape[:2]
    groups = mean.shape[1]
    rstd_by_channel = _by_channel(rstd, c)
    xhat = _xhat(u, _by_channel(mean, c), rstd_by_channel)
    dy = _dy(dz, _numbers(scale, scale_tensor), xhat, gamma, beta, activation)
    z = _recompute_z(dz, u, xhat, gamma, beta, activation, write_z)

    gamma_dy = _per_channel(gamma, dy, 1.0) * dy

    def group_mean(value: Tensor) -> Tensor:
        per_group = value.reshape(n, groups, c // groups * math.prod(value.shape[2:]))
        return _per_channel(_by_channel(per_group.mean(2), c), value, 0.0)

    du = gamma_dy - group_mean(gamma_dy) - xhat * group_mean(gamma_dy * xhat)
    du = _per_channel(rstd_by_channel, du, 1.0) * du
    # Over a whole group du sums to zero: exactly so where a channel is a group.
    own = _sum_channels(du) if groups < c else rstd.new_zeros(c)
    du = _add_extras(du, extras, _numbers(extra_coefficients, extra_coefficient_tensor))
    return dense(du.to(dtype), rows), _sum_channels(dy * xhat), _sum_channels(dy), own, z


def channel_sum(g: Tensor) -> Tensor:
    """Sum over all but the channels."""
    return _sum_channels(g.to(statistics_dtype(g.dtype)))


def stage_dots(g: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """<g, t_k> for each term: the gradient of the coefficients."""
    g = g.to(statistics_dtype(g.dtype))
    return torch.stack([(g * term.to(g.dtype)).sum() for term in terms])


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """clip(project(x_adv + step_size * sign(grad))), the projection onto the eps ball around x in the max norm."""
    arithmetic = statistics_dtype(x_adv.dtype)
    centre = x.to(arithmetic)
    moved = x_adv.to(arithmetic) + step_size * torch.sign(grad).to(arithmetic)
    moved = torch.minimum(torch.maximum(moved, centre - eps), centre + eps)
    return dense(moved.clamp(low, high).to(x_adv.dtype), is_rows(x_adv))


def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """clip(project(x_adv + step_size * grad / ||grad||)) per sample, norms Euclidean; a zero gradient moves nothing."""
    arithmetic = statistics_dtype(x_adv.dtype)
    g, centre = grad.to(arithmetic), x.to(arithmetic)

    def norm(value: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(value.flatten(1), dim=1)
        return norms.reshape(-1, *[1] * (value.dim() - 1))

    length = norm(g)
    direction = torch.where(length > 0, g / length, torch.zeros_like(g))
    delta = x_adv.to(arithmetic) + step_size * direction - centre
    length = norm(delta)
    delta = torch.where(length > eps, delta * (eps / length), delta)
    return dense((centre + delta).clamp(low, high).to(x_adv.dtype), is_rows(x_adv))


# --- differentiable functions and blocks -------------------------------------------------------------------------


def batch_norm_act(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
) -> Tensor:
    """z = act(batch_norm(u)); running statistics move as torch.nn.functional.batch_norm's do."""
    y = F.batch_norm(u, running_mean, running_var, gamma, beta, training, momentum, eps)
    return torch_activation(y, activation)


def group_norm_act(
    u: Tensor,
    num_groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float,
    activation: int,
) -> Tensor:
    """z = act(group_norm(u))."""
    return torch_activation(F.group_norm(u, num_groups, gamma, beta, eps), activation)


def torch_activation(y: Tensor, activation: int) -> Tensor:
    """The activation as torch.nn.functional has it."""
    match ACTIVATIONS[activation]:
        case "identity":
            return y
        case "relu":
            return F.relu(y)
        case "leaky_relu":
            return F.leaky_relu(y, LEAKY_RELU_SLOPE)
        case _:
            return F.silu(y)


def ssp_step(
    x: Tensor, branch: Callable[[Tensor], Tensor], scheme: ShuOsher, step_size: float = 1.0
) -> Tensor:
    """One step of ``scheme`` from x: u_i = sum_{k<i} ( alpha_ik u_k + beta_ik h F(u_k) ), F = ``branch``.

    F is evaluated once per stage, in stage order.
    """
    stages = [x]
    slopes: list[Tensor] = []
    for alpha, beta in zip(scheme.alpha, scheme.beta, strict=True):
        slopes.append(branch(stages[-1]))
        weights = [*alpha, *(b * step_size for b in beta)]
        operands = [w * t for w, t in zip(weights, [*stages, *slopes], strict=True) if w != 0]
        stages.append(sum(operands[1:], operands[0]))
    return stages[-1]


def adaptive_coefficients(a21: Tensor, b10: Tensor) -> tuple[Tensor, Tensor]:
    """SSP-adap's rows, a = sigmoid(a21), b = sigmoid(b10), with u1 substituted.

    Returns:
        ``[1, b]`` over ``(x, F(x))`` and ``[1, 1 - 1/(2b), 1/(2b)]`` over ``(x, F(x), F(u1))``. ``a21`` cancels: it
        is kept in the second row, never chosen, so that its gradient is a zero and not missing.
    """
    b = torch.sigmoid(b10)
    one = torch.ones_like(b)
    half = 1 / (2 * b)
    without_a21 = torch.where(torch.ones_like(b, dtype=torch.bool), one, a21)
    return torch.stack([one, b]), torch.stack([without_a21, 1 - half, half])


def adaptive_step(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    a21: Tensor,
    b10: Tensor,
    step_size: float = 1.0,
) -> Tensor:
    """SSP-adap as published: F(x) is evaluated twice, which running statistics show.

    u1 = x + b F(x);  u2 = (1-a) x + (1 - 1/(2b) - ab) F(x) + a u1 + 1/(2b) F(u1).
    """
    a, b = torch.sigmoid(a21), torch.sigmoid(b10)
    half = 1 / (2 * b)
    u1 = x + b * step_size * branch(x)
    slopes = (1 - half - a * b) * branch(x), half * branch(u1)
    return (1 - a) * x + step_size * slopes[0] + a * u1 + step_size * slopes[1]
