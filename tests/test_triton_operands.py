"""What the Triton ops refuse: each error names the op, the argument, what it must be and what it was. Nothing runs."""

import pytest
import torch

pytest.importorskip("triton")

from ssp_fused._triton.ops import OPS

X, V = torch.zeros(2, 4, 3, 3), torch.zeros(4)
HALF, BF16 = X.half(), X.bfloat16()
MASK = torch.zeros(2, 4, 2, dtype=torch.uint8)  # of planes: 9 bits each
RELU, SILU = 1, 3


def combine(terms=(X,), coefficients=(1.0,), tensor=None, bias=None):
    return OPS["stage_combine"](list(terms), list(coefficients), tensor, bias)


def normalize(mean=V, gamma=V, activation=RELU, dtype=None):
    return OPS["stage_norm_act"](
        [X], [1.0], None, None, mean, V, gamma, V, activation, dtype, False, False
    )


def group(num_groups=2, eps=1e-5):
    return OPS["stage_group_norm_act"](
        [X], [1.0], None, None, num_groups, V, V, eps, RELU, None, False
    )


def backward(dz=X, u=X, mask=None, mean=V, activation=RELU, sums=(None, None), extras=(), e=()):
    return OPS["norm_act_backward"](
        *(dz, 1.0, None, u, mask, mean, V, V, V, activation, *sums, 1.0, None),
        *(list(extras), list(e), None, None),
    )


BAD = {
    "shapes": (lambda: combine([X, X[:1]], [1, 1]), ValueError, r"terms .*\[2, 4, 3, 3\].*\[1, 4"),
    "halves": (
        lambda: combine([X, HALF, BF16], [1, 1, 1]),
        TypeError,
        r"terms and terms must share a dtype, .* but are torch.float16 and torch.bfloat16",
    ),
    "halves in other order": (
        lambda: combine([BF16, HALF, HALF], [1, 1, 1]),
        TypeError,
        "torch.bfloat16 and torch.float16",
    ),
    "double": (lambda: combine([X.double()], [1]), TypeError, "float32, .*but is torch.float64"),
    "device": (lambda: combine([X, X.to("meta")], [1, 1]), ValueError, "on cpu .*is on meta"),
    "dimensions": (lambda: combine([V], [1]), ValueError, r"\[N, C, \*spatial\], but has \[4\]"),
    "no terms": (lambda: combine([], []), ValueError, "1 to 6 tensors, but holds 0"),
    "seven terms": (lambda: combine([X] * 7, [1] * 7), ValueError, "1 to 6 .*holds 7"),
    "coefficients": (lambda: combine([X, X], [1]), ValueError, "hold 2 value.*holds 1"),
    "coefficients in a tensor": (
        lambda: combine([X, X], [], torch.zeros(3)),
        ValueError,
        "hold 2 value.*holds 3",
    ),
    "channel_bias": (lambda: combine(bias=V[:3]), ValueError, r"channel_bias .*\[4\].*\[3\]"),
    "mean": (lambda: normalize(mean=V[:, None]), ValueError, r"mean .*\[4\], but has \[4, 1\]"),
    "gamma": (lambda: normalize(gamma=V.long()), TypeError, "gamma must be float32.*int64"),
    "activation": (lambda: normalize(activation=4), ValueError, "from 0 to 3, but is 4"),
    "result": (lambda: normalize(dtype=torch.float64), TypeError, "z_dtype .*float64"),
    "groups": (lambda: group(3), ValueError, "num_groups must divide the 4 channels, but is 3"),
    "eps": (lambda: group(eps=-1.0), ValueError, "eps must not be negative, but is -1.0"),
    "u and mask": (lambda: backward(mask=MASK), ValueError, "u must be None where mask is given"),
    "mask": (
        lambda: backward(u=None, mean=None, mask=MASK[:1]),
        ValueError,
        r"mask must be uint8 on cpu of the shape \[2, 4, 2\].*\[1, 4, 2\]",
    ),
    "neither u nor mask": (
        lambda: backward(u=None, mean=None),
        ValueError,
        "u or mask must be given",
    ),
    "mean without u": (lambda: backward(u=None), ValueError, "mean must be given with u"),
    "mask of silu": (
        lambda: backward(u=None, mean=None, mask=MASK, activation=SILU),
        ValueError,
        "mask must be None for silu",
    ),
    "one sum": (lambda: backward(sums=(V, None)), ValueError, "must be given together"),
    "extras": (
        lambda: backward(extras=[X[:1]], e=[1]),
        ValueError,
        r"extras must have the shape \[2, 4, 3, 3\] of dz, but has \[1, 4, 3, 3\]",
    ),
    "extras and du": (
        lambda: backward(HALF, HALF, extras=[BF16], e=[1]),
        TypeError,
        "extras and du must share a dtype",
    ),
    "seven extras": (lambda: backward(extras=[X] * 7, e=[1] * 7), ValueError, "at most 6"),
    "grad": (
        lambda: OPS["l2_step"](X, X[:, :1], X, 0.1, 0.3, 0.0, 1.0),
        ValueError,
        r"l2_step: grad must have the shape \[2, 4, 3, 3\] of x_adv, but has \[2, 1, 3, 3\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_operands_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).split(":")[0] in OPS
