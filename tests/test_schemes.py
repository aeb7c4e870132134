"""Schemes against the literature: orders, SSP coefficients, Butcher tableaus."""

import math

import pytest
import torch

from ssp_fused import reference, schemes
from ssp_fused.schemes import ShuOsher

# name: stages, order, SSP coefficient of the representation
LITERATURE = {
    "euler": (1, 1, 1),
    "ssp22": (2, 2, 1),
    "ssp33": (3, 3, 1),
    "ssp43": (4, 3, 2),
    "ssp54": (5, 4, 1.508),
    "ssp104": (10, 4, 6),
    "midpoint": (2, 2, 0),
    "sspnet-midrk2": (2, 0, 1),
}


def test_table_is_the_literatures():
    assert set(schemes.names()) == set(LITERATURE)


@pytest.mark.parametrize("name", LITERATURE)
def test_properties(name):
    scheme = schemes.get(name)
    stages, order, coefficient = LITERATURE[name]
    assert scheme.name == name
    assert scheme.stages == stages
    assert scheme.order == order
    assert scheme.ssp_coefficient == pytest.approx(coefficient, abs=5e-4)


def test_butcher_of_heun_and_classic():
    matrix, b, c = schemes.get("ssp22").butcher()
    assert (matrix, b, c) == (((0, 0), (1, 0)), (0.5, 0.5), (0, 1))
    _, b, c = schemes.get("ssp33").butcher()
    assert b == pytest.approx((1 / 6, 1 / 6, 2 / 3))
    assert c == pytest.approx((0, 1, 1 / 2))


def test_order_of_the_classical_fourth_order_method():
    """RK4 in Shu-Osher form, with the negative alpha that keeps it from being SSP written as x's share."""
    rk4 = ShuOsher(
        "rk4",
        ((1,), (1, 0), (1, 0, 0), (1, 0, 0, 0)),
        ((1 / 2,), (0, 1 / 2), (0, 0, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    )
    assert rk4.order == 4
    assert rk4.ssp_coefficient == 0


def test_negative_beta_has_no_ssp_coefficient():
    scheme = ShuOsher("s", ((1,), (0.5, 0.5)), ((1,), (-0.5, 0.5)))
    assert scheme.ssp_coefficient == 0


@pytest.mark.parametrize("name", LITERATURE)
def test_measured_order_of_convergence(name):
    """Errors for u' = u^2 + t-free nonlinearity at two step sizes show the order."""
    scheme = schemes.get(name)
    x = torch.tensor([0.5, -0.3], dtype=torch.float64)

    def error(h):
        u, steps = x, round(0.5 / h)
        for _ in range(steps):
            u = reference.ssp_step(u, lambda v: v * v, scheme, h)
        return (u - x / (1 - 0.5 * x)).abs().max().item()

    # Truncation far above fp64's rounding, and steps small enough to be asymptotic.
    observed = math.log2(error(1 / 16) / error(1 / 32))
    assert observed == pytest.approx(scheme.order, abs=0.25)


def test_forward_euler_bound_is_kept():
    """What SSP means: a norm that Euler steps do not raise is not raised at ssp_coefficient times their size."""
    decay = torch.tensor([[-1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    limit = 1.0  # ||I + h A|| in the max norm is 1 up to h = 1

    for name, (_, _, coefficient) in LITERATURE.items():
        if coefficient < 1 or name == "sspnet-midrk2":
            continue
        scheme = schemes.get(name)
        h = scheme.ssp_coefficient * limit
        step = reference.ssp_step(torch.eye(2, dtype=torch.float64), lambda u: decay @ u, scheme, h)
        assert step.abs().sum(1).max() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (((0.9,),), ((1,),), "sum to 1"),
        (((1,), (1.5, -0.5)), ((1,), (0, 1)), "non-negative"),
        (((1,), (1,)), ((1,), (0, 1)), "2 entries"),
        (((1,),), ((1,), (0, 1)), "one row a stage"),
        ((), (), "at least one"),
    ],
)
def test_bad_tableaus(alpha, beta, message):
    with pytest.raises(ValueError, match=message):
        ShuOsher("bad", alpha, beta)


def test_unknown_scheme_names_the_known():
    with pytest.raises(ValueError, match="unknown scheme 'rk4'; known: euler, ssp22"):
        schemes.get("rk4")
    with pytest.raises(TypeError, match="ShuOsher"):
        schemes.get(3)
