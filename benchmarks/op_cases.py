"""Cases of the op benchmark: an op, its arguments, its logical bytes, and what it must compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssp_fused import _ops, reference
from ssp_fused._layout import is_rows, statistics_dtype
from tests import accuracy, eager

from .cases import DTYPES, LAYOUTS
from .traffic import Traffic

_RELU = _ops.ACTIVATIONS.index("relu")
_TERMS = 3
_COEFFICIENTS = (0.75, 0.25, 0.25)


class Operands:
    """Everything that an op may be given: drawn in fp64, rounded to the case's dtype.

    No activation's input is near zero (scales are small and shifts large), where a sign is a matter of rounding.
    """

    def __init__(self, seed: int, case: OpCase) -> None:
        generator = torch.Generator(case.device).manual_seed(seed)
        shape, dtype = case.shape, DTYPES[case.dtype]

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(
                sizes, generator=generator, device=case.device, dtype=statistics_dtype(dtype)
            )

        def activation() -> Tensor:
            return accuracy.lay_out(drawn(*shape).to(dtype), LAYOUTS[case.layout])

        n, c = shape[:2]
        self.groups = next(g for g in range(min(32, c), 0, -1) if c % g == 0)
        self.terms = [activation() for _ in range(_TERMS)]
        self.u, self.dz, self.extra = (activation() for _ in range(3))
        self.stage = (self.terms, list(_COEFFICIENTS), None, drawn(c))
        self.affine = (torch.full_like(drawn(c), 0.03), drawn(c).sign() * 2)
        self.norm = (0.1 * drawn(c), 1 + 0.1 * drawn(c).abs(), *self.affine, _RELU)
        self.table = (0.1 * drawn(n, self.groups), 1 + 0.1 * drawn(n, self.groups).abs())
        self.sums = (drawn(c), drawn(c))
        self.count = float(torch.Size(shape).numel() // c)
        self.extras = ([self.extra], [0.5], None)
        self.upstream = (self.dz, 0.25, None)
        self.step = (self.u, self.dz, self.extra, 0.1, 0.3, -0.5, 1.0)

    def mask(self) -> Tensor:
        """Of u > 0."""
        return reference.pack_mask(self.u > 0, is_rows(self.u))


@functools.lru_cache(maxsize=1)
def _operands(seed: int, case: OpCase) -> Operands:
    """Drawn once for all that is computed from them in turn."""
    return Operands(seed, case)


@dataclass(frozen=True)
class Spec:
    """One way of calling an op.

    Attributes:
        op: Its name in ``_ops.SCHEMAS``.
        arguments: From operands.
        results: Names of its results; those that start with "mask" are not compared (``accuracy.judged``).
        bytes: Logical bytes, of one launch.
    """

    op: str
    arguments: Callable[[Operands], tuple]
    results: tuple[str, ...]
    bytes: Callable[[Traffic], int]


SPECS = {
    "stage_combine": Spec(
        "stage_combine", lambda o: o.stage, ("u",), lambda t: t.stage_combine(_TERMS)
    ),
    "stage_moments": Spec(
        "stage_moments",
        lambda o: (*o.stage, True),
        ("u", "mean", "variance"),
        lambda t: t.stage_moments(_TERMS, write_u=True),
    ),
    "stage_norm_act": Spec(
        "stage_norm_act",
        lambda o: (*o.stage, *o.norm, None, True, False),
        ("u", "z", "mask"),
        lambda t: t.stage_norm_act(_TERMS, write_u=True),
    ),
    "stage_norm_act, mask": Spec(
        "stage_norm_act",
        lambda o: (*o.stage, *o.norm, None, True, True),
        ("u", "z", "mask"),
        lambda t: t.stage_norm_act(_TERMS, write_u=True, mask=True),
    ),
    "stage_batch_norm_act": Spec(
        "stage_batch_norm_act",
        lambda o: (*o.stage, *o.affine, 1e-5, _RELU, None, True),
        ("u", "z", "mean", "variance", "rstd"),
        lambda t: t.stage_batch_norm_act(_TERMS, write_u=True),
    ),
    "stage_group_norm_act": Spec(
        "stage_group_norm_act",
        lambda o: (*o.stage, o.groups, *o.affine, 1e-5, _RELU, None, True),
        ("u", "z", "mean", "rstd"),
        lambda t: t.stage_group_norm_act(_TERMS, write_u=True),
    ),
    "norm_act_backward_reduce": Spec(
        "norm_act_backward_reduce",
        lambda o: (*o.upstream, o.u, *o.norm, True),
        ("sum_dy", "sum_dy_xhat", "z"),
        lambda t: t.norm_act_backward_reduce(write_z=True),
    ),
    "norm_act_backward": Spec(
        "norm_act_backward",
        lambda o: (*o.upstream, o.u, None, *o.norm, *o.sums, o.count, None, *o.extras, None),
        ("du",),
        lambda t: t.norm_act_backward(1),
    ),
    "norm_act_backward, mask": Spec(
        "norm_act_backward",
        lambda o: (
            *(*o.upstream, None, o.mask(), None, *o.norm[1:], None, None, 1.0, None),
            *(*o.extras, None),
        ),
        ("du",),
        lambda t: t.norm_act_backward(1, mask=True),
    ),
    "batch_norm_act_backward": Spec(
        "batch_norm_act_backward",
        lambda o: (*o.upstream, o.u, *o.norm, *o.extras, True),
        ("du", "sum_dy", "sum_dy_xhat", "z"),
        lambda t: t.batch_norm_act_backward(1, write_z=True),
    ),
    "group_norm_act_backward": Spec(
        "group_norm_act_backward",
        lambda o: (*o.upstream, o.u, None, *o.table, *o.affine, _RELU, *o.extras, True),
        ("du", "dgamma", "dbeta", "own_sum", "z"),
        lambda t: t.group_norm_act_backward(1, write_z=True),
    ),
    "channel_sum": Spec("channel_sum", lambda o: (o.dz,), ("sum",), lambda t: t.channel_sum()),
    "stage_dots": Spec(
        "stage_dots", lambda o: (o.u, o.terms), ("dots",), lambda t: t.stage_dots(_TERMS)
    ),
    "linf_step": Spec("linf_step", lambda o: o.step, ("x_adv",), lambda t: t.linf_step()),
    "l2_step": Spec("l2_step", lambda o: o.step, ("x_adv",), lambda t: t.l2_step()),
}


@dataclass(frozen=True)
class OpCase:
    """One op on one shape.

    Attributes:
        spec: A key of :data:`SPECS`.
        shape: ``[N, C, *spatial]``.
        dtype: A key of ``cases.DTYPES``.
        layout: A key of ``cases.LAYOUTS``.
    """

    spec: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    device: torch.device

    @property
    def name(self) -> str:
        """All but the op and the device, which have columns of their own."""
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"

    @property
    def bytes(self) -> int:
        """Logical bytes of one launch."""
        itemsize = DTYPES[self.dtype].itemsize
        elements = torch.Size(self.shape).numel()
        return SPECS[self.spec].bytes(Traffic(elements * itemsize, itemsize))

    def arguments(self, seed: int) -> tuple:
        """The op's; the same values for one seed."""
        return SPECS[self.spec].arguments(_operands(seed, self))

    def check(self, name: str, op: Callable[..., Any]) -> str:
        """Apply the accuracy rule to an implementation of the op.

        Raises:
            AssertionError: A result is further from the specification in fp64 than allowed.
        """
        spec = SPECS[self.spec]

        def named(results: Any) -> dict[str, Tensor]:
            results = results if isinstance(results, tuple) else (results,)
            return dict(zip(spec.results, results, strict=True))

        def plain(seed: int, layout: str) -> dict[str, Tensor]:
            own = self.arguments(seed)
            return named(getattr(eager, spec.op)(*_each(own, lambda t: _relaid(t, self, layout))))

        @functools.lru_cache(maxsize=1)
        def truth(seed: int) -> dict[str, Tensor]:
            return named(getattr(reference, spec.op)(*_each(self.arguments(seed), _double)))

        accuracy.check(
            lambda seed: named(op(*self.arguments(seed))),
            plain,
            lambda seed, _: truth(seed),
            name,
        )
        return "fp64"


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, function) for v in value)
    return value


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _relaid(tensor: Tensor, case: OpCase, layout: str) -> Tensor:
    """Activations in another layout; a mask stays with its own, which the specification reads off its shape."""
    return accuracy.lay_out(tensor, layout) if tensor.shape == torch.Size(case.shape) else tensor
