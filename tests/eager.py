"""The ops as a PyTorch user writes them: whole-tensor expressions in the tensors' own dtype, and autograd.

The yardstick of ``accuracy.check``, and deliberately not the formulas of ``ssp_fused.reference``: sums are torch.sum's,
variances are the mean of squared deviations, gradients are autograd's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssp_fused import reference
from ssp_fused._layout import statistics_dtype

ACTIVATIONS = (lambda y: y, F.relu, lambda y: F.leaky_relu(y, 0.01), F.silu)


def channels(vector, like):
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def all_but_channels(value):
    return [0, *range(2, value.dim())]


def stage_combine(terms, coefficients, coefficient_tensor, channel_bias):
    numbers = coefficients if coefficient_tensor is None else coefficient_tensor
    u = sum(c * t for c, t in zip(numbers, terms, strict=True))
    return u if channel_bias is None else u + channels(channel_bias, u)


def mean_and_variance(value, dims):
    if value.numel() == 0:
        return value.sum(dims, keepdim=True), value.sum(dims, keepdim=True)
    mean = value.mean(dims, keepdim=True)
    return mean, (value - mean).square().mean(dims, keepdim=True)


def stage_moments(terms, coefficients, coefficient_tensor, channel_bias, write_u):
    u = stage_combine(terms, coefficients, coefficient_tensor, channel_bias)
    mean, variance = mean_and_variance(u.to(statistics_dtype(u.dtype)), all_but_channels(u))
    return u, mean.flatten(), variance.flatten()


def affine_act(xhat, gamma, beta, activation):
    return ACTIVATIONS[activation](xhat * channels(gamma, xhat) + channels(beta, xhat))


def stage_norm_act(terms, numbers, tensor, bias, mean, rstd, gamma, beta, activation, z_dtype, *_):
    u = stage_combine(terms, numbers, tensor, bias)
    value = u.to(statistics_dtype(u.dtype))
    z = affine_act((value - channels(mean, value)) * channels(rstd, value), gamma, beta, activation)
    return u, z.to(z_dtype or u.dtype), torch.empty(0, dtype=torch.uint8)


def stage_batch_norm_act(terms, numbers, tensor, bias, gamma, beta, eps, activation, z_dtype, _):
    u, mean, variance = stage_moments(terms, numbers, tensor, bias, True)
    value = u.to(statistics_dtype(u.dtype))
    rstd = 1 / (variance + eps).sqrt()
    z = affine_act((value - channels(mean, value)) * channels(rstd, value), gamma, beta, activation)
    return u, z.to(z_dtype or u.dtype), mean, variance, rstd


def by_groups(value, groups):
    return value.reshape(value.shape[0], groups, -1)


def stage_group_norm_act(
    terms, numbers, tensor, bias, groups, gamma, beta, eps, activation, z_dtype, _
):
    u = stage_combine(terms, numbers, tensor, bias)
    value = u.to(statistics_dtype(u.dtype))
    if value.numel() == 0:
        empty = value.new_empty(0, groups)
        return u, u.to(z_dtype or u.dtype), empty, empty
    grouped = by_groups(value, groups)
    mean, variance = mean_and_variance(grouped, 2)
    rstd = 1 / (variance + eps).sqrt()
    xhat = ((grouped - mean) * rstd).reshape(value.shape)
    z = affine_act(xhat, gamma, beta, activation).to(z_dtype or u.dtype)
    return u, z, mean[..., 0], rstd[..., 0]


def norm_act_backward_reduce(
    dz, scale, scale_tensor, u, mean, rstd, gamma, beta, activation, write_z
):
    value = u.to(statistics_dtype(u.dtype))
    gamma, beta = (v.clone().requires_grad_() for v in (gamma, beta))
    xhat = (value - channels(mean, value)) * channels(rstd, value)
    with torch.enable_grad():
        z = affine_act(xhat, gamma, beta, activation)
        d_gamma, d_beta = torch.autograd.grad(z, (gamma, beta), scale * dz.to(value.dtype))
    return d_beta, d_gamma, z.detach().to(dz.dtype)


def batch_norm_act_backward(
    dz, scale, tensor, u, mean, rstd, gamma, beta, activation, extras, numbers, _, write_z
):
    """Autograd through sums, the statistics being what they are told."""
    norm = (mean, rstd, gamma, beta, activation)
    sum_dy, sum_dy_xhat, z = norm_act_backward_reduce(dz, scale, tensor, u, *norm, write_z)
    value = u.to(statistics_dtype(u.dtype))
    xhat = (value - channels(mean, value)) * channels(rstd, value)
    with torch.enable_grad():
        y = (xhat * channels(gamma, xhat) + channels(beta, xhat)).requires_grad_()
        (dy,) = torch.autograd.grad(ACTIVATIONS[activation](y), y, scale * dz.to(value.dtype))
    count = max(u.numel() // u.shape[1], 1)
    inner = count * dy - channels(sum_dy, dy) - xhat * channels(sum_dy_xhat, dy)
    du = inner * channels(gamma * rstd, dy) / count
    du = du + stage_combine([e.to(du.dtype) for e in extras], numbers, None, None)
    return du.to(u.dtype), sum_dy, sum_dy_xhat, z


def group_norm_act_backward(
    dz, scale, tensor, u, bias, mean, rstd, gamma, beta, activation, extras, numbers, _, write_z
):
    """Autograd through the normalization, on a stage that nothing else uses."""
    groups = mean.shape[1]
    value = u if bias is None else stage_combine([u], [1.0], None, bias)
    value = value.to(statistics_dtype(u.dtype)).clone().requires_grad_()
    gamma, beta = (v.clone().requires_grad_() for v in (gamma, beta))
    with torch.enable_grad():
        if value.numel():
            y = F.group_norm(value, groups, gamma, beta, 1e-5)
        else:
            y = value * channels(gamma, value) + channels(beta, value)
        z = ACTIVATIONS[activation](y)
        du, d_gamma, d_beta = torch.autograd.grad(
            z, (value, gamma, beta), scale * dz.to(value.dtype)
        )
    own = du.sum(all_but_channels(du))
    du = du + stage_combine([e.to(du.dtype) for e in extras], numbers, None, None)
    return du.to(u.dtype), d_gamma, d_beta, own, z.detach().to(dz.dtype)


def channel_sum(g):
    return g.to(statistics_dtype(g.dtype)).sum(all_but_channels(g))


def stage_dots(g, terms):
    dtype = statistics_dtype(g.dtype)
    return torch.stack([torch.sum(g.to(dtype) * t.to(dtype)) for t in terms])


norm_act_backward = reference.norm_act_backward
linf_step = reference.linf_step
l2_step = reference.l2_step
