"""Explicit Runge-Kutta methods in Shu-Osher form: the table of schemes that a block may take.

One step from ``u_0 = x``:

    u_i = sum_{k<i} ( alpha_ik u_k + beta_ik h F(u_k) ),   i = 1..s,   result u_s
    alpha_ik >= 0,  sum_k alpha_ik = 1

Sources: C.-W. Shu, S. Osher, J. Comput. Phys. 77 (1988) for the form and the order-2 and order-3 methods; R. J.
Spiteri, S. J. Ruuth, SIAM J. Numer. Anal. 40 (2002) for SSPRK(5,4) and SSPRK(4,3); D. I. Ketcheson, SIAM J. Sci.
Comput. 30 (2008) for SSPRK(10,4); B. Kim et al., ECCV 2020 (arXiv 2010.10047) for their use as residual blocks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

# Published coefficients carry 15 digits; a condition of order 4 multiplies up to four of them.
_ORDER_TOLERANCE = 1e-12
_MAX_ORDER = 6

Rows = tuple[tuple[float, ...], ...]
Tree = tuple["Tree", ...]


@dataclass(frozen=True)
class ShuOsher:
    """A scheme in Shu-Osher form.

    Attributes:
        name: What users call it.
        alpha: Row ``i - 1`` holds ``alpha_i0 .. alpha_i,i-1``: non-negative, summing to 1.
        beta: The same shape; multiplies ``h F(u_k)``.

    Raises:
        ValueError: A row has the wrong length, an ``alpha`` is negative, or a row of ``alpha`` doesn't sum to 1.
    """

    name: str
    alpha: Rows
    beta: Rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", tuple(tuple(map(float, row)) for row in self.alpha))
        object.__setattr__(self, "beta", tuple(tuple(map(float, row)) for row in self.beta))
        if not self.alpha or len(self.alpha) != len(self.beta):
            raise ValueError(
                f"scheme {self.name!r}: alpha and beta must have one row a stage, at least one; "
                f"got {len(self.alpha)} and {len(self.beta)} rows"
            )
        for i, (a, b) in enumerate(zip(self.alpha, self.beta, strict=True), start=1):
            if len(a) != i or len(b) != i:
                raise ValueError(
                    f"scheme {self.name!r}: row {i} of alpha and beta must have {i} entries; "
                    f"got {len(a)} and {len(b)}"
                )
            if min(a) < 0 or abs(math.fsum(a) - 1) > _ORDER_TOLERANCE:
                raise ValueError(
                    f"scheme {self.name!r}: row {i} of alpha must be non-negative and sum to 1; got {a}"
                )

    @property
    def stages(self) -> int:
        """Evaluations of ``F`` in a step."""
        return len(self.alpha)

    @cached_property
    def ssp_coefficient(self) -> float:
        """min over ``beta_ik > 0`` of ``alpha_ik / beta_ik``, 0 if any beta is negative.

        A step of size ``h`` keeps every convex bound that an Euler step of size ``h / ssp_coefficient`` keeps.
        """
        entries = [
            (a, b)
            for row_a, row_b in zip(self.alpha, self.beta, strict=True)
            for a, b in zip(row_a, row_b, strict=True)
        ]
        if any(b < 0 for _, b in entries):
            return 0.0
        return min((a / b for a, b in entries if b > 0), default=math.inf)

    def butcher(self) -> tuple[Rows, tuple[float, ...], tuple[float, ...]]:
        """The same method as a Butcher tableau.

        Returns:
            ``(A, b, c)`` with ``u_i = x + h sum_j A_ij F(u_j)`` and ``u_s = x + h sum_j b_j F(u_j)``.
        """
        s = self.stages
        weights = [[0.0] * s]
        for row_a, row_b in zip(self.alpha, self.beta, strict=True):
            row = [math.fsum(a * weights[k][j] for k, a in enumerate(row_a)) for j in range(s)]
            for k, b in enumerate(row_b):
                row[k] += b
            weights.append(row)
        matrix = tuple(tuple(row) for row in weights[:-1])
        return matrix, tuple(weights[-1]), tuple(math.fsum(row) for row in matrix)

    @cached_property
    def order(self) -> int:
        """The largest p (up to 6) for which all order conditions of order 1..p hold; 0 if none does."""
        matrix, b, _ = self.butcher()
        for order in range(1, _MAX_ORDER + 1):
            for tree in _trees(order):
                weight = sum(bi * w for bi, w in zip(b, _stage_weights(tree, matrix), strict=True))
                if abs(weight - 1 / _density(tree)) > _ORDER_TOLERANCE:
                    return order - 1
        return _MAX_ORDER


def _trees(order: int) -> list[Tree]:
    """All rooted trees with ``order`` vertices, each as the sorted tuple of its root's subtrees."""
    if order == 1:
        return [()]
    found: set[Tree] = set()
    for sizes in _partitions(order - 1, order - 1):
        for children in itertools.product(*(_trees(size) for size in sizes)):
            found.add(tuple(sorted(children)))
    return sorted(found)


def _partitions(total: int, largest: int) -> list[list[int]]:
    if total == 0:
        return [[]]
    return [
        [first, *rest]
        for first in range(min(total, largest), 0, -1)
        for rest in _partitions(total - first, first)
    ]


def _size(tree: Tree) -> int:
    return 1 + sum(_size(child) for child in tree)


def _density(tree: Tree) -> int:
    return _size(tree) * math.prod(_density(child) for child in tree)


def _stage_weights(tree: Tree, matrix: Rows) -> list[float]:
    """Product over the root's subtrees of ``A @ stage_weights(subtree)``, per stage."""
    weights = [1.0] * len(matrix)
    for child in tree:
        inner = _stage_weights(child, matrix)
        for i, row in enumerate(matrix):
            weights[i] *= sum(a * w for a, w in zip(row, inner, strict=True))
    return weights


def _from_steps(name: str, *steps: dict[int, tuple[float, float]]) -> ShuOsher:
    """A scheme from its non-zero entries: step i maps k to ``(alpha_ik, beta_ik)``."""
    alpha = [[step.get(k, (0, 0))[0] for k in range(i)] for i, step in enumerate(steps, start=1)]
    beta = [[step.get(k, (0, 0))[1] for k in range(i)] for i, step in enumerate(steps, start=1)]
    return ShuOsher(name, tuple(map(tuple, alpha)), tuple(map(tuple, beta)))


_EULER = {0: (1, 1)}

_TABLE = {
    scheme.name: scheme
    for scheme in (
        _from_steps("euler", _EULER),
        _from_steps("ssp22", _EULER, {0: (1 / 2, 0), 1: (1 / 2, 1 / 2)}),
        _from_steps(
            "ssp33",
            _EULER,
            {0: (3 / 4, 0), 1: (1 / 4, 1 / 4)},
            {0: (1 / 3, 0), 2: (2 / 3, 2 / 3)},
        ),
        _from_steps(
            "ssp43",
            {0: (1, 1 / 2)},
            {1: (1, 1 / 2)},
            {0: (2 / 3, 0), 2: (1 / 3, 1 / 6)},
            {3: (1, 1 / 2)},
        ),
        _from_steps(
            "ssp54",
            {0: (1, 0.391752226571890)},
            {0: (0.444370493651235, 0), 1: (0.555629506348765, 0.368410593050371)},
            {0: (0.620101851488403, 0), 2: (0.379898148511597, 0.251891774271694)},
            {0: (0.178079954393132, 0), 3: (0.821920045606868, 0.544974750228521)},
            {
                2: (0.517231671970585, 0),
                3: (0.096059710526147, 0.063692468666290),
                4: (0.386708617503268, 0.226007483236906),
            },
        ),
        _from_steps(
            "ssp104",
            *({k: (1, 1 / 6)} for k in range(4)),
            {0: (3 / 5, 0), 4: (2 / 5, 1 / 15)},
            *({k: (1, 1 / 6)} for k in range(5, 9)),
            {0: (1 / 25, 0), 4: (9 / 25, 3 / 50), 9: (3 / 5, 1 / 10)},
        ),
        _from_steps("midpoint", {0: (1, 1 / 2)}, {0: (1, 0), 1: (0, 1)}),
        _from_steps("sspnet-midrk2", {0: (1, 1 / 2)}, {1: (1, 1)}),
    )
}


def names() -> tuple[str, ...]:
    """The names of all known schemes, which :func:`get` takes."""
    return tuple(_TABLE)


def get(scheme: str | ShuOsher) -> ShuOsher:
    """The scheme of that name; a :class:`ShuOsher` is returned as it is.

    Args:
        scheme: One of :func:`names`, or a scheme.

    Returns:
        The scheme.

    Raises:
        ValueError: No scheme has that name.
        TypeError: ``scheme`` is neither.
    """
    if isinstance(scheme, ShuOsher):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a name or a ShuOsher, got {type(scheme).__name__}")
    if scheme not in _TABLE:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(_TABLE)}")
    return _TABLE[scheme]
