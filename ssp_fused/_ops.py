"""The ops: every schema, declared once, and its fake implementation (exact shapes, strides and dtypes).

``ssp_fused::op`` is implemented for CPU and CUDA tensors by the compiled libraries (``_extension``); another
namespace may register the same signatures with :func:`declare`. What each op computes is defined, under the same
name, in ``reference``. Conventions shared by all of them:

* Activations are ``[N, C, *spatial]``; results follow the layout rule of ``_layout``.
* ``coefficients`` (and ``scale``, ``extra_coefficients``, ``count``) are numbers; the tensor argument beside each,
  where given, replaces it with values that live on the device.
* A result that is not wanted is an empty tensor of shape ``[0]``.
* ``activation`` is an index into :data:`ACTIVATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._layout import common_rows, empty, is_rows, mask_shape, stage_dtype, statistics_dtype

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu")
# Those whose derivative follows from one bit an element.
PIECEWISE_LINEAR = tuple(ACTIVATIONS.index(name) for name in ("identity", "relu", "leaky_relu"))
LEAKY_RELU_SLOPE = 0.01
MAX_TERMS = 6

_STAGE = "Tensor[] terms, float[] coefficients, Tensor? coefficient_tensor, Tensor? channel_bias"
_AFFINE = "Tensor? gamma, Tensor? beta"
_DZ = "Tensor dz, float scale, Tensor? scale_tensor"
_EXTRAS = "Tensor[] extras, float[] extra_coefficients, Tensor? extra_coefficient_tensor"
_STEP = "Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, float low, float high"

SCHEMAS = {
    "stage_combine": f"({_STAGE}) -> Tensor",
    # u, mean, biased variance
    "stage_moments": f"({_STAGE}, bool write_u) -> (Tensor, Tensor, Tensor)",
    # u, z, mask
    "stage_norm_act": f"({_STAGE}, Tensor mean, Tensor rstd, {_AFFINE}, int activation,"
    " ScalarType? z_dtype, bool write_u, bool write_mask) -> (Tensor, Tensor, Tensor)",
    # u, z, mean, biased variance, rstd
    "stage_batch_norm_act": f"({_STAGE}, {_AFFINE}, float eps, int activation,"
    " ScalarType? z_dtype, bool write_u) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # u, z, mean, rstd, the last two [N, num_groups]
    "stage_group_norm_act": f"({_STAGE}, int num_groups, {_AFFINE}, float eps, int activation,"
    " ScalarType? z_dtype, bool write_u) -> (Tensor, Tensor, Tensor, Tensor)",
    "update_running_stats_": "(Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, Tensor means, Tensor variances, float count,"
    " Tensor? count_tensor, float? momentum) -> ()",
    # sum dy, sum dy * xhat, z
    "norm_act_backward_reduce": f"({_DZ}, Tensor u, Tensor mean, Tensor rstd, {_AFFINE},"
    " int activation, bool write_z) -> (Tensor, Tensor, Tensor)",
    "norm_act_backward": f"({_DZ}, Tensor? u, Tensor? mask, Tensor? mean, Tensor rstd, {_AFFINE},"
    " int activation, Tensor? sum_dy, Tensor? sum_dy_xhat, float count, Tensor? count_tensor,"
    f" {_EXTRAS}, ScalarType? du_dtype) -> Tensor",
    # du, sum dy, sum dy * xhat, z
    "batch_norm_act_backward": f"({_DZ}, Tensor u, Tensor mean, Tensor rstd, {_AFFINE},"
    f" int activation, {_EXTRAS}, bool write_z) -> (Tensor, Tensor, Tensor, Tensor)",
    # du, dgamma, dbeta, per-channel sum of du before the extras, z
    "group_norm_act_backward": f"({_DZ}, Tensor u, Tensor? channel_bias, Tensor mean, Tensor rstd,"
    f" {_AFFINE}, int activation, {_EXTRAS}, bool write_z)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "channel_sum": "(Tensor g) -> Tensor",
    "stage_dots": "(Tensor g, Tensor[] terms) -> Tensor",
    "linf_step": f"({_STEP}) -> Tensor",
    "l2_step": f"({_STEP}) -> Tensor",
}

# The same with results that are the caller's tensors: dense, of the shape, dtype and layout of a new one, and of the
# others' memory at most one operand's as a whole. For CPU tensors only, which are best written where they were just
# read: the caches are smaller than a few of them. Results that may be left out are written where they are given.
OUT_SCHEMAS = {
    "stage_norm_act.out": f"({_STAGE}, Tensor mean, Tensor rstd, {_AFFINE}, int activation, *,"
    " Tensor(a!)? u, Tensor(b!) z, Tensor(c!)? mask) -> ()",
    "norm_act_backward.out": f"({_DZ}, Tensor? u, Tensor? mask, Tensor? mean, Tensor rstd, {_AFFINE},"
    " int activation, Tensor? sum_dy, Tensor? sum_dy_xhat, float count, Tensor? count_tensor,"
    f" {_EXTRAS}, *, Tensor(a!) du) -> ()",
    # sum dy, sum dy * xhat
    "batch_norm_act_backward.out": f"({_DZ}, Tensor u, Tensor mean, Tensor rstd, {_AFFINE},"
    f" int activation, {_EXTRAS}, *, Tensor(a!) du, Tensor(b!)? z) -> (Tensor, Tensor)",
}


def _unwanted(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _channels(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[1], dtype=statistics_dtype(like.dtype))


def _stage(terms: list[Tensor], write_u: bool = True) -> Tensor:
    dtype = stage_dtype(terms)
    if not write_u:
        return _unwanted(terms[0], dtype)
    return empty(terms[0], common_rows(terms), dtype)


def _normalized(terms: list[Tensor], z_dtype: torch.dtype | None) -> Tensor:
    return empty(terms[0], common_rows(terms), z_dtype or stage_dtype(terms))


def _statistics(terms: list[Tensor], *shape: int) -> Tensor:
    return terms[0].new_empty(shape, dtype=statistics_dtype(stage_dtype(terms)))


def _recomputed(dz: Tensor, u: Tensor, write_z: bool) -> Tensor:
    return empty(u, is_rows(u), dz.dtype) if write_z else _unwanted(u, dz.dtype)


def _stage_combine(terms, coefficients, coefficient_tensor, channel_bias):
    return _stage(terms)


def _stage_moments(terms, coefficients, coefficient_tensor, channel_bias, write_u):
    c = terms[0].shape[1]
    return _stage(terms, write_u), _statistics(terms, c), _statistics(terms, c)


def _stage_norm_act(
    terms,
    coefficients,
    coefficient_tensor,
    channel_bias,
    mean,
    rstd,
    gamma,
    beta,
    activation,
    z_dtype,
    write_u,
    write_mask,
):
    shape = mask_shape(terms[0].shape, common_rows(terms)) if write_mask else (0,)
    mask = terms[0].new_empty(shape, dtype=torch.uint8)
    return _stage(terms, write_u), _normalized(terms, z_dtype), mask


def _stage_batch_norm_act(
    terms,
    coefficients,
    coefficient_tensor,
    channel_bias,
    gamma,
    beta,
    eps,
    activation,
    z_dtype,
    write_u,
):
    statistics = [_statistics(terms, terms[0].shape[1]) for _ in range(3)]
    return _stage(terms, write_u), _normalized(terms, z_dtype), *statistics


def _stage_group_norm_act(
    terms,
    coefficients,
    coefficient_tensor,
    channel_bias,
    num_groups,
    gamma,
    beta,
    eps,
    activation,
    z_dtype,
    write_u,
):
    statistics = [_statistics(terms, terms[0].shape[0], num_groups) for _ in range(2)]
    return _stage(terms, write_u), _normalized(terms, z_dtype), *statistics


def _update_running_stats_(
    running_mean,
    running_var,
    num_batches_tracked,
    means,
    variances,
    count,
    count_tensor,
    momentum,
):
    return None


def _norm_act_backward_reduce(
    dz, scale, scale_tensor, u, mean, rstd, gamma, beta, activation, write_z
):
    return _channels(u), _channels(u), _recomputed(dz, u, write_z)


def _norm_act_backward(
    dz,
    scale,
    scale_tensor,
    u,
    mask,
    mean,
    rstd,
    gamma,
    beta,
    activation,
    sum_dy,
    sum_dy_xhat,
    count,
    count_tensor,
    extras,
    extra_coefficients,
    extra_coefficient_tensor,
    du_dtype,
):
    if u is not None:
        return empty(u, is_rows(u), du_dtype or u.dtype)
    rows = mask.dim() == 2 if mask is not None else is_rows(dz)
    return empty(dz, rows, du_dtype or dz.dtype)


def _batch_norm_act_backward(
    dz,
    scale,
    scale_tensor,
    u,
    mean,
    rstd,
    gamma,
    beta,
    activation,
    extras,
    extra_coefficients,
    extra_coefficient_tensor,
    write_z,
):
    du = empty(u, is_rows(u), u.dtype)
    return du, _channels(u), _channels(u), _recomputed(dz, u, write_z)


def _group_norm_act_backward(
    dz,
    scale,
    scale_tensor,
    u,
    channel_bias,
    mean,
    rstd,
    gamma,
    beta,
    activation,
    extras,
    extra_coefficients,
    extra_coefficient_tensor,
    write_z,
):
    du = empty(u, is_rows(u), u.dtype)
    return du, _channels(u), _channels(u), _channels(u), _recomputed(dz, u, write_z)


def _channel_sum(g):
    return _channels(g)


def _stage_dots(g, terms):
    return g.new_empty(len(terms), dtype=statistics_dtype(g.dtype))


def _attack_step(x_adv, grad, x, step_size, eps, low, high):
    return empty(x_adv, is_rows(x_adv), x_adv.dtype)


_FAKES: dict[str, Callable] = {
    "stage_combine": _stage_combine,
    "stage_moments": _stage_moments,
    "stage_norm_act": _stage_norm_act,
    "stage_batch_norm_act": _stage_batch_norm_act,
    "stage_group_norm_act": _stage_group_norm_act,
    "update_running_stats_": _update_running_stats_,
    "norm_act_backward_reduce": _norm_act_backward_reduce,
    "norm_act_backward": _norm_act_backward,
    "batch_norm_act_backward": _batch_norm_act_backward,
    "group_norm_act_backward": _group_norm_act_backward,
    "channel_sum": _channel_sum,
    "stage_dots": _stage_dots,
    "linf_step": _attack_step,
    "l2_step": _attack_step,
}


def declare(
    namespace: str, schemas: Mapping[str, str] = SCHEMAS, fakes: Mapping[str, Callable] = _FAKES
) -> torch.library.Library:
    """Declare ops in ``namespace``; the returned library must be kept alive."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in schemas.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
    return library


def _nothing(*_, **__):
    return None


def _batch_norm_act_backward_out(*arguments, du, z):
    return _channels(du), _channels(du)


_OUT_FAKES: dict[str, Callable] = {
    "stage_norm_act.out": _nothing,
    "norm_act_backward.out": _nothing,
    "batch_norm_act_backward.out": _batch_norm_act_backward_out,
}

_LIBRARY = declare("ssp_fused", SCHEMAS | OUT_SCHEMAS, _FAKES | _OUT_FAKES)
