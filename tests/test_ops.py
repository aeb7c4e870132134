"""Every op against its specification in fp64, by the rule of ``accuracy``, and against its schema by opcheck."""

import contextlib
import functools
import math
import unittest.mock

import eager
import pytest
import torch
from accuracy import (
    ACTIVATIONS,
    DTYPES,
    LARGE_SHAPE,
    SEEDS,
    SHAPES,
    cases,
    check,
    generator,
    lay_out,
)

from ssp_fused import _ops, available_backends, reference
from ssp_fused._layout import is_rows, stage_dtype, statistics_dtype

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"cpu backend: {available_backends()['cpu']}"
)

OPS = torch.ops.ssp_fused
LAYOUTS = ("planes", "rows", "slice")
COEFFICIENTS = (0.75, 0.25, -0.5, 1.0, 2 / 3, 0.1)
RELU = _ops.ACTIVATIONS.index("relu")


class Inputs:
    """Everything that an op may be given, drawn in fp64 and rounded to the dtype under test."""

    def __init__(self, seed, shape, dtype, layout, terms=2, mixed=False):
        g = generator(seed, len(shape), *shape, terms)
        self.dtype, self.layout = dtype, layout
        self.count = max(1, torch.Size(shape).numel() // shape[1])

        def activation(like=dtype):
            return lay_out(torch.randn(shape, generator=g, dtype=torch.float64).to(like), layout)

        def vector(low, high):
            values = torch.rand(shape[1], generator=g, dtype=torch.float64) * (high - low) + low
            return values.to(statistics_dtype(dtype))

        dtypes = [torch.float32 if mixed and k == 0 else dtype for k in range(terms)]
        self.terms = [activation(d) for d in dtypes]
        self.stage_dtype = stage_dtype(self.terms)
        self.u, self.dz = activation(self.stage_dtype), activation()
        self.extras = [activation(self.stage_dtype), activation(self.stage_dtype)]
        self.bias, self.mean, self.beta = vector(-1, 1), vector(-0.5, 0.5), vector(-1, 1)
        self.rstd, self.gamma = vector(0.5, 2), vector(-1.5, 1.5)
        self.stage = (self.terms, list(COEFFICIENTS[:terms]), None, self.bias)


def to_fp64(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_fp64(v) for v in value)
    return torch.float64 if isinstance(value, torch.dtype) else value


def judge(name, arguments, results, plain_arguments=None):
    """Compare ``OPS.name(*arguments(seed, layout))`` with the specification, result by result.

    Where rounding belongs to the arguments' meaning, the others are given ``plain_arguments``.
    """
    plain_arguments = plain_arguments or arguments

    def named(values):
        values = values if isinstance(values, tuple) else (values,)
        return dict(zip(results, values, strict=True))

    def contender(seed):
        given = arguments(seed, None)
        out = named(getattr(OPS, name)(*given))
        if seed == SEEDS[0]:
            for key, fake in named(fake_of(name, given)).items():
                assert out[key].dtype == fake.dtype, key
                assert out[key].shape == fake.shape, key
                assert out[key].stride() == fake.stride(), key
        return out

    def plain(seed, layout):
        return named(getattr(eager, name)(*plain_arguments(seed, layout)))

    @functools.cache
    def in_fp64(seed):
        with exact_sums():
            return named(getattr(reference, name)(*to_fp64(plain_arguments(seed, "planes"))))

    check(contender, plain, lambda seed, _: in_fp64(seed), name)


@contextlib.contextmanager
def exact_sums():
    """The specification's sums over a channel without rounding: in fp64 its own would be half of all there is."""

    def exact(value):
        values = value.movedim(1, 0).flatten(1).tolist()
        return torch.tensor([math.fsum(channel) for channel in values], dtype=value.dtype)

    with unittest.mock.patch.object(reference, "_sum_channels", exact):
        yield


def fake_of(name, arguments):
    with torch._subclasses.FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            if isinstance(value, (list, tuple)):
                return type(value)(fake(v) for v in value)
            return value

        return getattr(OPS, name)(*fake(list(arguments)))


@functools.lru_cache(maxsize=64)
def inputs(seed, shape, dtype, layout, **options):
    return Inputs(seed, shape, dtype, layout, **options)


def over(shape, dtype, layout, build, **options):
    """arguments(seed, layout or None for the case's own)."""
    return lambda seed, other: build(inputs(seed, shape, dtype, other or layout, **options))


FORMS = (*cases(("planes", "rows"), DTYPES), ("slice", torch.float32))
# Where chunks begin and end does not depend on the dtype.
LARGE = [(f, LARGE_SHAPE) for f in (("planes", torch.float32), ("rows", torch.bfloat16))]


def pytest_generate_tests(metafunc):
    if "form" in metafunc.fixturenames:
        pairs = [*cases(FORMS, SHAPES), *LARGE]
        ids = [f"{f[0]}-{str(f[1])[6:]}-{'x'.join(map(str, s))}" for f, s in pairs]
        metafunc.parametrize(("form", "shape"), pairs, ids=ids)


ONE_ACTIVATION = {torch.float64: "silu", torch.float16: "relu", torch.bfloat16: "leaky_relu"}


def activations(dtype, shape, names=ACTIVATIONS):
    """All of them in fp32 on the small shapes, one elsewhere: dtype and chunking are not the activation's matter."""
    one = "relu" if shape == LARGE_SHAPE else ONE_ACTIVATION.get(dtype)
    return [_ops.ACTIVATIONS.index(name) for name in names if one in (None, name)]


def test_stage_combine(form, shape):
    layout, dtype = form
    for terms in (1, 2, 3, 6):
        judge("stage_combine", over(shape, dtype, layout, lambda i: i.stage, terms=terms), "u")


def test_stage_moments(form, shape):
    layout, dtype = form
    arguments = over(shape, dtype, layout, lambda i: (*i.stage, True))
    judge("stage_moments", arguments, ("u", "mean", "variance"))


def test_stage_norm_act(form, shape):
    for activation in activations(form[1], shape):
        stage_norm_act_by(*form, shape, activation)


def stage_norm_act_by(layout, dtype, shape, activation):
    judge(
        "stage_norm_act",
        over(
            shape,
            dtype,
            layout,
            lambda i: (
                *i.stage,
                i.mean,
                i.rstd,
                i.gamma,
                i.beta,
                activation,
                None,
                True,
                True,
            ),
        ),
        ("u", "z", "mask"),
    )


def test_stage_batch_norm_act(form, shape):
    for activation in activations(form[1], shape):
        stage_batch_norm_act_by(*form, shape, activation)


def stage_batch_norm_act_by(layout, dtype, shape, activation):
    judge(
        "stage_batch_norm_act",
        over(
            shape,
            dtype,
            layout,
            lambda i: (*i.stage, i.gamma, i.beta, 1e-5, activation, None, True),
        ),
        ("u", "z", "mean", "variance", "rstd"),
    )


def divisors(channels):
    return sorted({1, channels, next((d for d in range(2, channels) if channels % d == 0), 1)})


def test_stage_group_norm_act(form, shape):
    for activation in activations(form[1], shape):
        stage_group_norm_act_by(*form, shape, activation)


def stage_group_norm_act_by(layout, dtype, shape, activation):
    for groups in divisors(shape[1]):
        judge(
            "stage_group_norm_act",
            over(
                shape,
                dtype,
                layout,
                lambda i, groups=groups: (
                    *i.stage,
                    groups,
                    i.gamma,
                    i.beta,
                    1e-5,
                    activation,
                    None,
                    True,
                ),
            ),
            ("u", "z", "mean", "rstd"),
        )


def test_norm_act_backward_reduce(form, shape):
    for activation in activations(form[1], shape):
        norm_act_backward_reduce_by(*form, shape, activation)


def norm_act_backward_reduce_by(layout, dtype, shape, activation):
    judge(
        "norm_act_backward_reduce",
        over(
            shape,
            dtype,
            layout,
            lambda i: (i.dz, 0.25, None, i.u, i.mean, i.rstd, i.gamma, i.beta, activation, True),
        ),
        ("sum_dy", "sum_dy_xhat", "z"),
    )


def test_norm_act_backward(form, shape):
    for activation in activations(form[1], shape):
        norm_act_backward_by(*form, shape, activation)


def norm_act_backward_by(layout, dtype, shape, activation):

    def build(i, sums, extras):
        return (
            i.dz,
            0.25,
            None,
            i.u,
            None,
            i.mean,
            i.rstd,
            i.gamma,
            i.beta,
            activation,
            i.bias * i.count**0.5 if sums else None,
            i.beta * i.count**0.5 if sums else None,
            float(i.count),
            None,
            i.extras[:extras],
            [0.5, 1.0][:extras],
            None,
            None,
        )

    for sums, extras in ((False, 0), (True, 0), (True, 1), (False, 2)):
        judge(
            "norm_act_backward",
            over(
                shape,
                dtype,
                layout,
                lambda i, sums=sums, extras=extras: build(i, sums, extras),
            ),
            ("du",),
        )


def test_norm_act_backward_by_mask(form, shape):
    """By the packed mask alone, without u."""
    for activation in activations(form[1], shape, ("identity", "relu", "leaky_relu")):
        norm_act_backward_by_mask(*form, shape, activation)


def norm_act_backward_by_mask(layout, dtype, shape, code):

    def build(i):
        mask = reference.pack_mask(i.u > 0, i.layout == "rows" and is_rows(i.u))
        return (
            i.dz,
            1.0,
            None,
            None,
            mask if code else None,
            None,
            i.rstd,
            i.gamma,
            i.beta,
            code,
            None,
            None,
            1.0,
            None,
            i.extras[:1],
            [1.0],
            None,
            i.u.dtype,
        )

    judge("norm_act_backward", over(shape, dtype, layout, build), ("du",))


def test_batch_norm_act_backward(form, shape):
    for activation in activations(form[1], shape):
        batch_norm_act_backward_by(*form, shape, activation)


def batch_norm_act_backward_by(layout, dtype, shape, activation):
    judge(
        "batch_norm_act_backward",
        over(
            shape,
            dtype,
            layout,
            lambda i: (
                i.dz,
                0.25,
                None,
                i.u,
                i.mean,
                i.rstd,
                i.gamma,
                i.beta,
                activation,
                i.extras,
                [0.5, 1.0],
                None,
                True,
            ),
        ),
        ("du", "sum_dy", "sum_dy_xhat", "z"),
    )


def test_group_norm_act_backward(form, shape):
    for activation in activations(form[1], shape):
        group_norm_act_backward_by(*form, shape, activation)


def group_norm_act_backward_by(layout, dtype, shape, activation):
    def build(i, groups, biased, stored):
        """``stored``: the stage with its bias added and rounded, which is what is normalized."""
        bias = i.bias if biased else None
        rounded = reference.stage_combine([i.u], [1.0], None, bias)
        _, _, mean, rstd = reference.stage_group_norm_act(
            [rounded], [1.0], None, None, groups, None, None, 1e-5, activation, None, False
        )
        return (
            i.dz,
            0.25,
            None,
            rounded if stored else i.u,
            None if stored else bias,
            mean,
            rstd,
            i.gamma,
            i.beta,
            activation,
            i.extras,
            [0.5, 1.0],
            None,
            True,
        )

    def arguments(**options):
        return over(shape, dtype, layout, lambda i: build(i, **options))

    for groups, biased in ((1, True), (divisors(shape[1])[-2:][0], True), (shape[1], False)):
        case = {"groups": groups, "biased": biased}
        judge(
            "group_norm_act_backward",
            arguments(**case, stored=False),
            ("du", "dgamma", "dbeta", "own_sum", "z"),
            arguments(**case, stored=True),
        )


def test_reductions(form, shape):
    layout, dtype = form
    judge("channel_sum", over(shape, dtype, layout, lambda i: (i.dz,)), ("sum",))
    judge("stage_dots", over(shape, dtype, layout, lambda i: (i.u, i.terms), terms=3), ("dots",))


def test_attack_steps(form, shape):
    layout, dtype = form
    for name in ("linf_step", "l2_step"):
        judge(
            name,
            over(shape, dtype, layout, lambda i: (i.u, i.dz, i.terms[0], 0.1, 0.3, -0.5, 1.0)),
            ("x_adv",),
        )


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_stage_with_narrow_branch(narrow, shape):
    """An fp32 stage with a half-precision slope stays fp32; z is written in the convolution's dtype."""
    for layout in LAYOUTS:
        judge(
            "stage_norm_act",
            over(
                shape,
                narrow,
                layout,
                lambda i: (
                    *i.stage,
                    i.mean,
                    i.rstd,
                    i.gamma,
                    i.beta,
                    RELU,
                    i.dtype,
                    True,
                    True,
                ),
                mixed=True,
            ),
            ("u", "z", "mask"),
        )
        judge(
            "batch_norm_act_backward",
            over(
                shape,
                narrow,
                layout,
                lambda i: (
                    i.dz,
                    1.0,
                    None,
                    i.u,
                    i.mean,
                    i.rstd,
                    i.gamma,
                    i.beta,
                    RELU,
                    i.extras,
                    [0.5, 1.0],
                    None,
                    True,
                ),
                mixed=True,
            ),
            ("du", "sum_dy", "sum_dy_xhat", "z"),
        )


def test_mixed_layouts_and_parameter_dtypes():
    """Terms of different layouts, and bf16 parameters beside fp32 activations."""
    i = Inputs(0, (2, 5, 4, 3), torch.float32, "planes", terms=3)
    mixed = [lay_out(t, layout) for t, layout in zip(i.terms, LAYOUTS, strict=True)]
    vectors = [v.bfloat16() for v in (i.mean, i.rstd, i.gamma, i.beta)]
    out = OPS.stage_norm_act(mixed, *i.stage[1:], *vectors, RELU, None, True, True)
    expected = reference.stage_norm_act(mixed, *i.stage[1:], *vectors, RELU, None, True, True)
    assert all(is_rows(t) for t in out[:2])
    assert torch.equal(out[2], expected[2])
    for value, want in zip(out, expected, strict=True):
        torch.testing.assert_close(value, want)


def test_numbers_on_the_device():
    """Coefficients, scale and count read from tensors are the numbers they hold."""
    i = Inputs(0, (2, 5, 4, 3), torch.float32, "planes", terms=3)
    terms, numbers, _, bias = i.stage
    assert torch.equal(
        OPS.stage_combine(terms, numbers, None, bias),
        OPS.stage_combine(terms, [], torch.tensor(numbers), bias),
    )
    norm = (i.u, None, i.mean, i.rstd, i.gamma, i.beta, RELU, i.bias, i.beta)
    assert torch.equal(
        OPS.norm_act_backward(
            i.dz, 0.25, None, *norm, 24.0, None, i.extras, [0.5, 2.0], None, None
        ),
        OPS.norm_act_backward(
            i.dz,
            7.0,
            torch.tensor(0.25),
            *norm,
            7.0,
            torch.tensor(24.0),
            i.extras,
            [],
            torch.tensor([0.5, 2.0]),
            None,
        ),
    )


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_update_running_stats(momentum, dtype):
    def update(op, arithmetic):
        g = generator(3)
        mean, var = torch.randn(5, generator=g).to(dtype), torch.rand(5, generator=g).to(dtype)
        tracked = torch.tensor(4)
        means = torch.randn(3, 5, generator=g).to(arithmetic)
        variances = torch.rand(3, 5, generator=g).to(arithmetic)
        op(mean, var, tracked, means, variances, 7.0, None, momentum)
        op(mean, var, tracked, means[:1], variances[:1], 0.0, None, momentum)
        op(mean, var, tracked, means[:1], variances[:1], 0.0, means.new_tensor(9.0), momentum)
        op(None, None, tracked, means, variances, 7.0, None, momentum)
        return mean, var, tracked

    arithmetic = statistics_dtype(dtype)
    out = update(OPS.update_running_stats_, arithmetic)
    expected = update(reference.update_running_stats_, arithmetic)
    assert out[2].item() == expected[2].item() == 12
    torch.testing.assert_close(out, expected)


def opcheck_arguments():
    i = Inputs(0, (2, 4, 3, 3), torch.float32, "rows", terms=2)
    norm = (i.mean, i.rstd, i.gamma, i.beta, RELU)
    extras = (i.extras, [0.5, 1.0], None)
    group = torch.zeros(2, 2)
    mask = reference.pack_mask(i.u > 0, True)
    stats = (torch.zeros(4), torch.ones(4), torch.tensor(0))
    step = (i.u, i.dz, i.terms[0], 0.1, 0.3, -0.5, 1.0)
    return {
        "stage_combine": [i.stage, (i.terms, [], torch.tensor([0.5, 1.0]), None)],
        "stage_moments": [(*i.stage, True), (*i.stage, False)],
        "stage_norm_act": [
            (*i.stage, *norm, None, True, True),
            (*i.stage, *norm, torch.bfloat16, False, False),
        ],
        "stage_batch_norm_act": [(*i.stage, i.gamma, i.beta, 1e-5, RELU, None, True)],
        "stage_group_norm_act": [(*i.stage, 2, None, None, 1e-5, RELU, None, False)],
        "update_running_stats_": [
            (*stats, i.mean[None], i.rstd[None], 8.0, None, 0.1),
            (*stats, i.mean[None], i.rstd[None], 8.0, torch.tensor(8.0), None),
        ],
        "norm_act_backward_reduce": [(i.dz, 1.0, None, i.u, *norm, True)],
        "norm_act_backward": [
            (i.dz, 1.0, None, i.u, None, *norm, i.bias, i.beta, 18.0, None, *extras, None),
            (i.dz, 1.0, None, None, mask, None, *norm[1:], None, None, 1.0, None, *extras, None),
        ],
        "batch_norm_act_backward": [(i.dz, 1.0, None, i.u, *norm, *extras, False)],
        "group_norm_act_backward": [
            (i.dz, 1.0, None, i.u, i.bias, group, group + 1, *norm[2:], *extras, True)
        ],
        "channel_sum": [(i.dz,)],
        "stage_dots": [(i.u, i.terms)],
        "linf_step": [step],
        "l2_step": [step],
    }


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_opcheck(name):
    op = getattr(OPS, name).default
    for arguments in opcheck_arguments()[name]:
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_of_stage_norm_act(dtype, rows):
    """One bit an element, not (y <= 0), for zeros and NaN too, whole vectors and what is left of them."""
    for c, side in ((8, 8), (17, 3), (1, 37)):
        u = torch.randn(2, c, side, side).relu_().to(dtype)
        u[0, 0, 0, 0] = torch.nan
        u = u.to(memory_format=torch.channels_last if rows else torch.contiguous_format)
        vector = torch.ones(c, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        norm = (vector - 1, vector, None, None)
        operands = ([u], [1.0], None, None, *norm, ACTIVATIONS.index("relu"), None, False, True)
        expected = reference.stage_norm_act(*operands)[2]
        assert torch.equal(torch.ops.ssp_fused.stage_norm_act(*operands)[2], expected)
