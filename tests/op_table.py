"""The table of tests that every implementation of the ops passes: a class to derive from, one a namespace."""

from typing import ClassVar

import pytest
import torch
from accuracy import ACTIVATIONS, DTYPES, LARGE_SHAPE, SHAPES, cases, generator, lay_out
from op_judge import Implementation, Inputs, judge, over

from ssp_fused import _ops, reference
from ssp_fused._layout import is_rows, statistics_dtype

LAYOUTS = ("planes", "rows", "slice")
RELU = _ops.ACTIVATIONS.index("relu")
FORMS = (*cases(("planes", "rows"), DTYPES), ("slice", torch.float32))
# Where chunks begin and end does not depend on the dtype.
LARGE = [(f, LARGE_SHAPE) for f in (("planes", torch.float32), ("rows", torch.bfloat16))]
ONE_ACTIVATION = {torch.float64: "silu", torch.float16: "relu", torch.bfloat16: "leaky_relu"}
DTYPES_OF = {
    "narrow": (torch.float16, torch.bfloat16),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
}


def activations(dtype, shape, names=ACTIVATIONS):
    """All of them in fp32 on the small shapes, one elsewhere: dtype and chunking are not the activation's matter."""
    one = "relu" if shape == LARGE_SHAPE else ONE_ACTIVATION.get(dtype)
    return [_ops.ACTIVATIONS.index(name) for name in names if one in (None, name)]


def divisors(channels):
    return sorted({1, channels, next((d for d in range(2, channels) if channels % d == 0), 1)})


class OpTable:
    """Every op against its specification in fp64, by the rule of ``accuracy``, and against its schema by opcheck."""

    implementation: ClassVar[Implementation]

    def pytest_generate_tests(self, metafunc):
        served, shapes = self.implementation.dtypes, self.implementation.shapes
        if "form" in metafunc.fixturenames:
            pairs = [*cases(FORMS, SHAPES), *LARGE]
            pairs = [(f, s) for f, s in pairs if f[1] in served and s in shapes]
            ids = [f"{f[0]}-{str(f[1])[6:]}-{'x'.join(map(str, s))}" for f, s in pairs]
            metafunc.parametrize(("form", "shape"), pairs, ids=ids)
        elif "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", [s for s in SHAPES if s in shapes], ids=str)
        for argument in DTYPES_OF.keys() & set(metafunc.fixturenames):
            dtypes = [d for d in DTYPES_OF[argument] if d in served]
            metafunc.parametrize(argument, dtypes, ids=lambda d: str(d)[6:])

    @pytest.fixture(autouse=True)
    def _usable(self):
        reason = self.implementation.unusable()
        if reason is not None:
            pytest.skip(reason)

    def judge(self, name, arguments, results, plain_arguments=None):
        judge(self.implementation, name, arguments, results, plain_arguments)

    def test_stage_combine(self, form, shape):
        layout, dtype = form
        for terms in (1, 2, 3, 6):
            arguments = over(shape, dtype, layout, lambda i: i.stage, terms=terms)
            self.judge("stage_combine", arguments, "u")

    def test_stage_moments(self, form, shape):
        layout, dtype = form
        arguments = over(shape, dtype, layout, lambda i: (*i.stage, True))
        self.judge("stage_moments", arguments, ("u", "mean", "variance"))

    def test_stage_norm_act(self, form, shape):
        layout, dtype = form
        for activation in activations(dtype, shape):

            def build(i, activation=activation):
                return (*i.stage, *i.norm, activation, None, True, True)

            self.judge("stage_norm_act", over(shape, dtype, layout, build), ("u", "z", "mask"))

    def test_stage_batch_norm_act(self, form, shape):
        layout, dtype = form
        results = ("u", "z", "mean", "variance", "rstd")
        for activation in activations(dtype, shape):

            def build(i, activation=activation):
                return (*i.stage, *i.affine, 1e-5, activation, None, True)

            self.judge("stage_batch_norm_act", over(shape, dtype, layout, build), results)

    def test_stage_group_norm_act(self, form, shape):
        layout, dtype = form
        results = ("u", "z", "mean", "rstd")
        for activation, groups in cases(activations(dtype, shape), divisors(shape[1])):

            def build(i, groups=groups, activation=activation):
                return (*i.stage, groups, *i.affine, 1e-5, activation, None, True)

            self.judge("stage_group_norm_act", over(shape, dtype, layout, build), results)

    def test_norm_act_backward_reduce(self, form, shape):
        layout, dtype = form
        results = ("sum_dy", "sum_dy_xhat", "z")
        for activation in activations(dtype, shape):

            def build(i, activation=activation):
                return (i.dz, 0.25, None, i.u, *i.norm, activation, True)

            self.judge("norm_act_backward_reduce", over(shape, dtype, layout, build), results)

    def test_norm_act_backward(self, form, shape):
        layout, dtype = form
        variants = ((False, 0), (True, 0), (True, 1), (False, 2))
        for activation, (summed, extras) in cases(activations(dtype, shape), variants):

            def build(i, activation=activation, summed=summed, extras=extras):
                sums = [v * i.count**0.5 if summed else None for v in (i.bias, i.beta)]
                added = (i.extras[:extras], [0.5, 1.0][:extras], None)
                norm = (*i.norm, activation, *sums, float(i.count), None)
                return (i.dz, 0.25, None, i.u, None, *norm, *added, None)

            self.judge("norm_act_backward", over(shape, dtype, layout, build), ("du",))

    def test_norm_act_backward_by_mask(self, form, shape):
        """By the packed mask alone, without u."""
        layout, dtype = form
        for code in activations(dtype, shape, ("identity", "relu", "leaky_relu")):

            def build(i, code=code):
                mask = reference.pack_mask(i.u > 0, i.layout == "rows" and is_rows(i.u))
                norm = (None, i.rstd, *i.affine, code, None, None, 1.0, None)
                added = (i.extras[:1], [1.0], None)
                return (i.dz, 1.0, None, None, mask if code else None, *norm, *added, i.u.dtype)

            self.judge("norm_act_backward", over(shape, dtype, layout, build), ("du",))

    def test_batch_norm_act_backward(self, form, shape):
        layout, dtype = form
        results = ("du", "sum_dy", "sum_dy_xhat", "z")
        for activation in activations(dtype, shape):

            def build(i, activation=activation):
                added = (i.extras, [0.5, 1.0], None)
                return (i.dz, 0.25, None, i.u, *i.norm, activation, *added, True)

            self.judge("batch_norm_act_backward", over(shape, dtype, layout, build), results)

    def test_group_norm_act_backward(self, form, shape):
        layout, dtype = form
        results = ("du", "dgamma", "dbeta", "own_sum", "z")
        variants = ((1, True), (divisors(shape[1])[-2:][0], True), (shape[1], False))
        for activation, (groups, biased) in cases(activations(dtype, shape), variants):

            def build(i, stored, activation=activation, groups=groups, biased=biased):
                """``stored``: the stage with its bias added and rounded, which is what is normalized."""
                bias = i.bias if biased else None
                rounded = reference.stage_combine([i.u], [1.0], None, bias)
                normalization = (groups, None, None, 1e-5, activation, None, False)
                stage = ([rounded], [1.0], None, None)
                _, _, mean, rstd = reference.stage_group_norm_act(*stage, *normalization)
                u, bias = (rounded, None) if stored else (i.u, bias)
                added = (i.extras, [0.5, 1.0], None)
                return (i.dz, 0.25, None, u, bias, mean, rstd, *i.affine, activation, *added, True)

            def of_stored(i, build=build):
                return build(i, stored=True)

            def of_unstored(i, build=build):
                return build(i, stored=False)

            self.judge(
                "group_norm_act_backward",
                over(shape, dtype, layout, of_unstored),
                results,
                over(shape, dtype, layout, of_stored),
            )

    def test_reductions(self, form, shape):
        layout, dtype = form
        self.judge("channel_sum", over(shape, dtype, layout, lambda i: (i.dz,)), ("sum",))
        dots = over(shape, dtype, layout, lambda i: (i.u, i.terms), terms=3)
        self.judge("stage_dots", dots, ("dots",))

    def test_attack_steps(self, form, shape):
        layout, dtype = form

        def build(i):
            return (i.u, i.dz, i.terms[0], 0.1, 0.3, -0.5, 1.0)

        for name in ("linf_step", "l2_step"):
            self.judge(name, over(shape, dtype, layout, build), ("x_adv",))

    def test_float32_stage_with_narrow_branch(self, narrow, shape):
        """An fp32 stage with a half-precision slope stays fp32; z is written in the convolution's dtype."""

        def forward(i):
            return (*i.stage, *i.norm, RELU, i.dtype, True, True)

        def backward(i):
            return (i.dz, 1.0, None, i.u, *i.norm, RELU, i.extras, [0.5, 1.0], None, True)

        for layout in LAYOUTS:
            arguments = over(shape, narrow, layout, forward, mixed=True)
            self.judge("stage_norm_act", arguments, ("u", "z", "mask"))
            arguments = over(shape, narrow, layout, backward, mixed=True)
            results = ("du", "sum_dy", "sum_dy_xhat", "z")
            self.judge("batch_norm_act_backward", arguments, results)

    def test_mixed_layouts_and_parameter_dtypes(self):
        """Terms of different layouts, and bf16 parameters beside fp32 activations."""
        i = Inputs(0, (2, 5, 4, 3), torch.float32, "planes", terms=3)
        mixed = [lay_out(t, layout) for t, layout in zip(i.terms, LAYOUTS, strict=True)]
        vectors = [v.bfloat16() for v in i.norm]
        arguments = (mixed, *i.stage[1:], *vectors, RELU, None, True, True)
        out = self.implementation.call("stage_norm_act", *arguments)
        expected = reference.stage_norm_act(*arguments)
        assert all(is_rows(t) for t in out[:2])
        assert torch.equal(out[2], expected[2])
        for value, want in zip(out, expected, strict=True):
            torch.testing.assert_close(value, want)

    def test_numbers_on_the_device(self):
        """Coefficients, scale and count read from tensors are the numbers they hold."""
        call = self.implementation.call
        i = Inputs(0, (2, 5, 4, 3), torch.float32, "planes", terms=3)
        terms, numbers, _, bias = i.stage
        assert torch.equal(
            call("stage_combine", terms, numbers, None, bias),
            call("stage_combine", terms, [], torch.tensor(numbers), bias),
        )
        norm = (i.u, None, *i.norm, RELU, i.bias, i.beta)
        added = (i.extras, [0.5, 2.0], None, None)
        read = (i.extras, [], torch.tensor([0.5, 2.0]), None)
        count = torch.tensor(24.0)
        assert torch.equal(
            call("norm_act_backward", i.dz, 0.25, None, *norm, 24.0, None, *added),
            call("norm_act_backward", i.dz, 7.0, torch.tensor(0.25), *norm, 7.0, count, *read),
        )

    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
    def test_update_running_stats(self, momentum, dtype):
        arithmetic = statistics_dtype(dtype)

        def update(op, place):
            g = generator(3)
            mean, var = torch.randn(5, generator=g).to(dtype), torch.rand(5, generator=g).to(dtype)
            means = torch.randn(3, 5, generator=g).to(arithmetic)
            variances = torch.rand(3, 5, generator=g).to(arithmetic)
            mean, var, means, variances = place((mean, var, means, variances))
            tracked, count = place((torch.tensor(4), means.new_tensor(9.0)))
            op(mean, var, tracked, means, variances, 7.0, None, momentum)
            op(mean, var, tracked, means[:1], variances[:1], 0.0, None, momentum)
            op(mean, var, tracked, means[:1], variances[:1], 0.0, count, momentum)
            op(None, None, tracked, means, variances, 7.0, None, momentum)
            return mean.cpu(), var.cpu(), tracked.cpu()

        op = self.implementation.ops.update_running_stats_
        out = update(op, self.implementation.place)
        expected = update(reference.update_running_stats_, lambda tensors: tensors)
        assert out[2].item() == expected[2].item() == 12
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("name", _ops.SCHEMAS)
    def test_opcheck(self, name):
        op = getattr(self.implementation.ops, name).default
        for arguments in opcheck_arguments()[name]:
            results = torch.library.opcheck(op, self.implementation.place(arguments))
            assert set(results.values()) == {"SUCCESS"}, results

    @pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
    def test_the_mask_of_stage_norm_act(self, dtype, rows):
        """One bit an element, not (y <= 0), for zeros and NaN too, whole vectors and what is left of them."""
        for c, side in ((8, 8), (17, 3), (1, 37)):
            u = torch.randn(2, c, side, side).relu_().to(dtype)
            u[0, 0, 0, 0] = torch.nan
            u = u.to(memory_format=torch.channels_last if rows else torch.contiguous_format)
            vector = torch.ones(c, dtype=statistics_dtype(dtype))
            norm = (vector - 1, vector, None, None)
            operands = ([u], [1.0], None, None, *norm, RELU, None, False, True)
            mask = self.implementation.call("stage_norm_act", *operands)[2]
            assert torch.equal(mask, reference.stage_norm_act(*operands)[2])


def opcheck_arguments():
    i = Inputs(0, (2, 4, 3, 3), torch.float32, "rows", terms=2)
    norm = (*i.norm, RELU)
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
