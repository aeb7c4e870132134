"""Bad input: the error's type, and the argument, requirement and value that its message names."""

import re
from types import SimpleNamespace

import pytest
import torch

import ssp_fused
from ssp_fused import _log, functional, nn

X = torch.randn(2, 4, 3, 3)
V = torch.ones(4)
RUNNING = (torch.zeros(4), torch.ones(4))


def combine(terms, coefficients, **options):
    return functional.stage_combine(terms, coefficients, **options)


def batch(terms=(X,), coefficients=(1.0,), weight=V, bias=V, running=RUNNING, **options):
    options = {"training": True, **options}
    return functional.stage_batch_norm_act(terms, coefficients, weight, bias, *running, **options)


def group(num_groups=2, **options):
    return functional.stage_group_norm_act([X], [1.0], num_groups, V, V, **options)


def step(x_adv=X, grad=X, x=X, **options):
    options = {"step_size": 0.1, "eps": 0.3, **options}
    return functional.linf_step(x_adv, grad, x, **options)


BAD = {
    "no terms": (lambda: combine([], []), ValueError, "terms must hold 1 to 6 tensors, got 0"),
    "seven terms": (lambda: combine([X] * 7, [1.0] * 7), ValueError, "1 to 6 tensors, got 7"),
    "a tensor for terms": (lambda: combine(X, [1.0]), TypeError, "sequence of tensors"),
    "not a tensor": (lambda: combine([X, 3], [1, 1]), TypeError, r"terms\[1\].*int"),
    "one dimension": (lambda: combine([V], [1.0]), ValueError, r"\[N, C, \*spatial\].*\(4,\)"),
    "integers": (lambda: combine([X.long()], [1.0]), TypeError, "float32.*int64"),
    "complex": (lambda: combine([X + 0j], [1.0]), TypeError, "complex64"),
    "shapes": (
        lambda: combine([X, X[:1]], [1, 1]),
        ValueError,
        r"terms\[1\].*\(2, 4, 3, 3\).*\(1, 4, 3, 3\)",
    ),
    "devices": (lambda: combine([X, X.to("meta")], [1, 1]), ValueError, "device.*cpu.*meta"),
    "float64 mixed": (lambda: combine([X, X.double()], [1, 1]), TypeError, "mix float64"),
    "halves mixed": (
        lambda: combine([X.half(), X.bfloat16()], [1, 1]),
        TypeError,
        "float16 with bfloat16",
    ),
    "count": (lambda: combine([X, X], [1.0]), ValueError, r"one number a term \(2\), got 1"),
    "coefficient table": (
        lambda: combine([X], torch.ones(1, 1)),
        ValueError,
        r"coefficients must be a 1-D tensor, got shape \(1, 1\)",
    ),
    "channel bias": (
        lambda: combine([X], [1.0], channel_bias=torch.ones(3)),
        ValueError,
        r"channel_bias must have shape \(4,\).*\(3,\)",
    ),
    "weight": (lambda: batch(weight=torch.ones(5)), ValueError, r"weight must have shape \(4,\)"),
    "bias": (lambda: batch(bias=torch.ones(4, 1)), ValueError, "bias must have shape"),
    "running": (
        lambda: batch(running=(torch.ones(3), torch.ones(4))),
        ValueError,
        "running_mean must have shape",
    ),
    "running missing": (
        lambda: batch(running=(None, None), training=False),
        ValueError,
        "running_mean and running_var must be given",
    ),
    "one value": (
        lambda: batch([torch.randn(1, 4)]),
        ValueError,
        "more than 1 value per channel when training",
    ),
    "activation": (
        lambda: batch(activation="tanh"),
        ValueError,
        "unknown activation 'tanh'; known: identity, relu, leaky_relu, silu",
    ),
    "eps": (lambda: batch(eps=-1.0), ValueError, "eps must not be negative, got -1.0"),
    "groups": (lambda: group(3), ValueError, "num_groups must divide the 4 channels.*got 3"),
    "no groups": (lambda: group(0), ValueError, "num_groups"),
    "attack eps": (lambda: step(eps=-0.1), ValueError, "eps must not be negative, got -0.1"),
    "attack bounds": (lambda: step(bounds=(1, 0)), ValueError, r"low <= high, got \(1, 0\)"),
    "attack shapes": (lambda: step(grad=X[:1]), ValueError, "grad must have the shape of x_adv"),
    "attack dtypes": (lambda: step(x=X.double()), TypeError, "x must have the dtype of x_adv"),
    "scheme": (lambda: nn.SSPBlock(4, "rk4"), ValueError, "unknown scheme 'rk4'; known: euler"),
    "norm": (lambda: nn.SSPBlock(4, norm="layer"), ValueError, "unknown norm 'layer'; known"),
    "block activation": (
        lambda: nn.SSPBlock(4, activation="gelu"),
        ValueError,
        "unknown activation 'gelu'",
    ),
    "block groups": (
        lambda: nn.SSPBlock(4, num_groups=2),
        ValueError,
        "num_groups must be None for norm 'batch', got 2",
    ),
    "backend": (
        lambda: ssp_fused.use_backend("cudnn"),
        ValueError,
        "unknown backend 'cudnn'; known: auto, reference, cpu, triton, cuda",
    ),
    "absent backend": (
        lambda: ssp_fused.use_backend("triton"),
        RuntimeError,
        "backend 'triton' is not usable here: ",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_message(what):
    call, error, message = BAD[what]
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)


def test_nothing_is_written_before_an_error():
    running = [r.clone() for r in RUNNING]
    with pytest.raises(ValueError, match="weight"):
        batch(weight=torch.ones(5), running=running)
    assert torch.equal(running[0], RUNNING[0]) and torch.equal(running[1], RUNNING[1])


def test_explicit_backend_raises_instead_of_falling_back():
    if ssp_fused.available_backends()["cpu"] is not None:
        pytest.skip(ssp_fused.available_backends()["cpu"])
    with (
        ssp_fused.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this call: it serves cpu"),
    ):
        combine([X.to("meta")], [1.0])


def test_environment_variable(monkeypatch):
    import ssp_fused._backends as backends

    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setenv("SSP_FUSED_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown SSP_FUSED_BACKEND 'fast'"):
        combine([X], [1.0])
    monkeypatch.setenv("SSP_FUSED_BACKEND", "reference")
    combine([X], [1.0])
    assert backends._chosen == "reference"


def test_backend_choice_nests():
    import ssp_fused._backends as backends

    ssp_fused.use_backend("auto")
    with ssp_fused.use_backend("reference"):
        assert backends.current() == "reference"
        with ssp_fused.use_backend("auto"):
            assert backends.current() == "auto"
        assert backends.current() == "reference"
    assert backends.current() == "auto"
    with pytest.raises(ValueError, match="unknown backend"), ssp_fused.use_backend("gpu"):
        pass
    assert backends.current() == "auto"


def test_auto_leaves_large_tensors_of_a_gpu_to_triton_if_it_can(monkeypatch):
    import ssp_fused._backends as backends

    def chosen(size, *usable, device="cuda"):
        for name in ("cpu", "cuda", "triton"):
            refusal = None if name in usable else "not here"
            monkeypatch.setattr(
                backends._BACKENDS[name], "refusal", lambda ops, tensors, r=refusal: r
            )
        sizes = {"numel": lambda: size // 4, "element_size": lambda: 4}
        tensor = SimpleNamespace(device=torch.device(device), **sizes)
        return backends.select(["stage_combine"], [tensor]).name

    assert chosen(255 << 20, "cuda", "triton") == "cuda"
    assert chosen(256 << 20, "cuda", "triton") == "triton"
    assert chosen(256 << 20, "cuda") == "cuda"
    assert chosen(1 << 20, "triton") == "triton"
    assert chosen(1 << 30, "cpu", "cuda", "triton", device="cpu") == "cpu"


def test_auto_says_once_that_it_leaves_a_device_to_plain_pytorch(caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    for _ in range(3):
        combine([X.to("meta")], [1.0])
    said = [r for r in caplog.records if "plain PyTorch" in r.message]
    assert len(said) == 1 and "meta" in said[0].message
