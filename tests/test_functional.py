"""The differentiable functions: first and second derivatives, what they save, alias and refuse."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import ACTIVATIONS, check, generator, lay_out
from torch import Tensor

import ssp_fused
from ssp_fused import functional

pytestmark = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)

SHAPE = (3, 4, 2, 3)


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def fp64(*shape, seed=0, grad=True):
    return torch.randn(
        shape, generator=generator(seed, *shape), dtype=torch.float64
    ).requires_grad_(grad)


class Case:
    """Leaf tensors and the function of them that is under test."""

    def __init__(self, kind, activation, learned, terms=2, biased=True):
        self.kind, self.activation, self.learned = kind, activation, learned
        self.terms = [fp64(*SHAPE, seed=k) for k in range(terms)]
        self.coefficients = torch.tensor([0.75, -0.5, 1.0][:terms], dtype=torch.float64)
        self.coefficients.requires_grad_(learned)
        self.bias = fp64(SHAPE[1], seed=9) if biased else None
        self.affine = [fp64(SHAPE[1], seed=10), fp64(SHAPE[1], seed=11)]
        self.running = [
            fp64(SHAPE[1], seed=12, grad=False),
            fp64(SHAPE[1], seed=13, grad=False).abs() + 0.5,
        ]

    @property
    def leaves(self) -> list[Tensor]:
        leaves = [*self.terms, *self.affine] if self.kind != "combine" else [*self.terms]
        leaves += [self.bias] if self.bias is not None else []
        return [*leaves, self.coefficients] if self.learned else leaves

    def __call__(self, *_):
        coefficients = self.coefficients if self.learned else self.coefficients.tolist()
        stage = (self.terms, coefficients)
        match self.kind:
            case "combine":
                return functional.stage_combine(*stage, channel_bias=self.bias)
            case "group":
                return functional.stage_group_norm_act(
                    *stage, 2, *self.affine, channel_bias=self.bias, activation=self.activation
                )
            case _:
                training = self.kind == "train"
                running = [None, None] if training else self.running
                return functional.stage_batch_norm_act(
                    *stage,
                    *self.affine,
                    *running,
                    channel_bias=self.bias,
                    training=training,
                    activation=self.activation,
                )


KINDS = ["combine", "train", "eval", "group"]


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, activation, learned):
    if kind == "combine" and activation != "identity":
        return
    case = Case(kind, activation, learned)
    assert torch.autograd.gradcheck(case, case.leaves)


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind, activation, learned):
    if kind == "combine" and activation != "identity":
        return
    case = Case(kind, activation, learned)
    assert torch.autograd.gradgradcheck(case, case.leaves)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_mask_path_derivatives(activation):
    """With nothing but the input differentiable: first and second derivatives from masks alone."""
    x, weight = fp64(*SHAPE), fp64(SHAPE[1], seed=4, grad=False)
    mean, var = fp64(SHAPE[1], seed=5, grad=False), fp64(SHAPE[1], seed=6, grad=False) ** 2 + 0.5

    def function(x):
        return functional.stage_batch_norm_act(
            [x], [1.0], weight, weight, mean, var, training=False, activation=activation
        )

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("kind", ["train", "eval", "group"])
def test_second_derivative_where_the_input_depends_on_the_weights(kind):
    """x = f(w) must not be counted twice, nor its history be lost, in a gradient's gradient."""
    case = Case(kind, "silu", False)
    root, base = fp64(SHAPE[1], seed=20), [t.detach() for t in case.terms]

    def penalty():
        weight = root * 2
        case.terms = [t * weight.view(1, -1, 1, 1) for t in base]
        case.affine = [weight, case.affine[1].detach()]
        u, z = case()
        (slope,) = torch.autograd.grad((z**2).sum() + u.sum(), root, create_graph=True)
        (second,) = torch.autograd.grad((slope**2).sum(), root)
        return second

    result = penalty()
    with ssp_fused.use_backend("reference"):
        expected = penalty()
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def eager_function(kind, terms, coefficients, bias, weight, shift, running, activation):
    act = {"identity": lambda y: y, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}
    u = sum((c * t for c, t in zip(coefficients, terms, strict=True)), torch.zeros_like(terms[0]))
    u = u + bias.view(1, -1, *[1] * (u.dim() - 2))
    if kind == "group":
        y = F.group_norm(u, 2, weight, shift)
    else:
        y = F.batch_norm(u, *running, weight, shift, kind == "train")
    return u, act[activation](y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["planes", "rows", "slice"])
@pytest.mark.parametrize("kind", ["train", "eval", "group"])
def test_outputs_gradients_and_running_statistics(kind, layout, dtype):
    """Forward and backward together, against autograd through plain PyTorch."""
    shape = (3, 6, 5, 7)

    def inputs(seed, kind_of_layout, to):
        g = generator(seed, 77)

        def draw(*size, low=None):
            values = torch.randn(size, generator=g, dtype=torch.float64)
            return (values.abs() + low if low else values).to(dtype).to(to)

        terms = [lay_out(draw(*shape), kind_of_layout).requires_grad_() for _ in range(3)]
        vectors = [draw(6).requires_grad_() for _ in range(3)]
        running = [draw(6), draw(6, low=0.5)]
        return terms, vectors, running, [draw(*shape), draw(*shape)]

    def results(function, seed, kind_of_layout, to=dtype):
        terms, (bias, weight, shift), running, grads = inputs(seed, kind_of_layout, to)
        u, z = function(terms, bias, weight, shift, running)
        torch.autograd.backward([u, z], grads)
        values = {"u": u.detach(), "z": z.detach(), "bias": bias.grad, "weight": weight.grad}
        values |= {"shift": shift.grad, "mean": running[0], "var": running[1]}
        return values | {f"term{k}": t.grad for k, t in enumerate(terms)}

    numbers = (0.75, 1.0, -0.5)

    def fused(terms, bias, weight, shift, running):
        if kind == "group":
            return functional.stage_group_norm_act(
                terms, numbers, 2, weight, shift, channel_bias=bias
            )
        return functional.stage_batch_norm_act(
            terms, numbers, weight, shift, *running, channel_bias=bias, training=kind == "train"
        )

    def plain(activation_mask=None):
        def function(terms, bias, weight, shift, running):
            u, y = eager_function(kind, terms, numbers, bias, weight, shift, running, "identity")
            if activation_mask is None:
                return u, F.relu(y)
            return u, F.relu(y).detach() + (y - y.detach()) * activation_mask

        return function

    check(
        lambda seed: results(fused, seed, layout),
        lambda seed, other: results(plain(), seed, other),
        lambda seed, values: results(plain(values["z"] > 0), seed, "planes", torch.float64),
        f"{kind} {layout} {dtype}",
    )


def test_zero_dimensional_and_volumetric_activations():
    for shape in ((5, 4), (3, 4, 5), (2, 4, 3, 2, 3)):
        for layout in ("planes", "rows"):
            x = lay_out(fp64(*shape, grad=False), layout).requires_grad_()
            u, z = functional.stage_batch_norm_act(
                [x], [0.5], None, None, None, None, training=True
            )
            assert u.shape == z.shape == x.shape
            assert u.stride() == x.stride()
            expected = F.relu(F.batch_norm(0.5 * x, None, None, training=True))
            torch.testing.assert_close(z, expected)


def test_gradients_are_asked_for_exactly():
    """What needs no gradient gets none, and what does gets one in its own dtype."""
    for wanted in itertools.product([False, True], repeat=4):
        x, bias, weight, shift = (
            t.requires_grad_(w)
            for t, w in zip(
                (torch.randn(SHAPE), torch.randn(4), torch.randn(4), torch.randn(4)),
                wanted,
                strict=True,
            )
        )
        for training in (True, False):
            running = [torch.zeros(4), torch.ones(4)]
            u, z = functional.stage_batch_norm_act(
                [x], [0.5], weight, shift, *running, channel_bias=bias, training=training
            )
            if not any(wanted):
                assert not z.requires_grad
                continue
            leaves = [t for t in (x, bias, weight, shift) if t.requires_grad]
            grads = torch.autograd.grad(z.sum() + u.sum(), leaves)
            assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves, strict=True))


def test_frozen_evaluation_keeps_masks_only():
    """Attacking a frozen eval-mode layer holds 1 bit an element, 1/32 of the fp32 input."""
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    weight = torch.ones(16)
    running = [torch.zeros(16), torch.ones(16)]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.stage_batch_norm_act([x], [1.0], weight, weight, *running, training=False)
    size = sum(t.numel() * t.element_size() for t in saved)
    assert size < x.numel() * 4 / 32 + 1024


def test_results_alias_no_input():
    x = torch.randn(SHAPE)
    for z in (
        functional.stage_combine([x], [1.0]),
        *functional.stage_group_norm_act([x], [1.0], 2, None, None, activation="identity"),
        functional.linf_step(x, x, x, step_size=0.0, eps=1.0, bounds=(-9, 9)),
    ):
        assert z.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", ["train", "eval", "group"])
def test_in_place_edits_are_noticed(kind):
    case = Case(kind, "relu", False)
    u, z = case()
    with torch.no_grad():
        u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_saved_statistics_are_copies():
    """A forward in training mode between forward and backward must not change the gradient."""
    x = fp64(*SHAPE)
    running = [torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    weight = fp64(4, seed=1)

    def evaluate():
        return functional.stage_batch_norm_act([x], [1.0], weight, None, *running, training=False)[
            1
        ]

    (expected,) = torch.autograd.grad(evaluate().pow(2).sum(), weight)
    z = evaluate()
    functional.stage_batch_norm_act([x], [1.0], weight, None, *running, training=True)
    (gradient,) = torch.autograd.grad(z.pow(2).sum(), weight)
    assert torch.equal(gradient, expected)


def test_create_graph_leaves_buffers_alone():
    case = Case("train", "relu", False)
    running = [torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    _, z = functional.stage_batch_norm_act(
        case.terms, [1.0, 1.0], *case.affine, *running, training=True
    )
    before = [r.clone() for r in running]
    (g,) = torch.autograd.grad(z.pow(2).sum(), case.terms[0], create_graph=True)
    g.pow(2).sum().backward()
    assert all(map(torch.equal, before, running))


def test_function_transforms_are_refused_clearly():
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        torch.func.vmap(lambda t: functional.stage_combine([t], [1.0]))(torch.randn(2, 3, 4))
    with ssp_fused.use_backend("reference"):
        torch.func.grad(lambda t: functional.stage_combine([t], [0.5]).sum())(torch.randn(3, 4))


def test_autocast_writes_z_for_the_convolution():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u, z = functional.stage_batch_norm_act(
            [x, x.detach().bfloat16()], [0.5, 0.5], weight, None, None, None, training=True
        )
    assert (u.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    z.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
