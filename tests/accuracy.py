"""The one tolerance rule, the one table of shapes and the one list of seeds that all accuracy tests share.

A contender is compared with the reference in fp64, its error pooled over the seeds, and bounded by twice that of the
plain PyTorch version in the contender's dtype:

    max|out - ref64| <= 2 max over both layouts |eager_same_dtype - ref64| + 2 eps(dtype) max|ref64|
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

SEEDS = (0, 1, 2, 3, 4)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("planes", "rows")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu")

# [N, C, *spatial]: odd channel counts, 1x1 maps, N of 0 and 1, 0, 1 and 3 spatial dimensions, several chunks.
SHAPES = (
    (2, 3, 5, 7),
    (3, 1, 6, 5),
    (1, 17, 4, 3),
    (2, 65, 3, 3),
    (4, 16, 1, 1),
    (0, 3, 4, 4),
    (2, 16, 8, 8),
    (5, 17),
    (3, 4, 9),
    (2, 3, 3, 2, 5),
)
LARGE_SHAPE = (2, 24, 23, 21)

Values = Mapping[str, Tensor | None]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, dense in the given layout, or as a slice of a larger buffer."""
    if layout == "rows" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":
        wide = tensor.new_full([size + 2 for size in tensor.shape], float("nan"))
        inner = wide[tuple(slice(1, size + 1) for size in tensor.shape)]
        inner.copy_(tensor)
        return inner
    return tensor.contiguous()


def check(
    contender: Callable[[int], Values],
    eager: Callable[[int, str], Values],
    reference: Callable[[int, Values], Values],
    what: str = "",
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Apply the rule to every tensor that ``contender`` returns.

    Args:
        contender: Seed to named results.
        eager: Seed and layout to the results of plain PyTorch in the contender's dtype.
        reference: Seed, and the results of the one to be judged (which may hold its activation masks), to the
            fp64 results.
        what: Prefix of the failure message.
        seeds: Fewer than all of them only for a contender that is too slow for more.
    """
    error: dict[str, float] = {}
    allowed: dict[str, float] = {}
    largest: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    for seed in seeds:
        values = contender(seed)
        truth = reference(seed, values)
        for name, value in judged(values):
            dtypes[name] = value.dtype
            expected = truth[name]
            assert expected is not None, f"{what} {name}: the reference has none"
            assert value.shape == expected.shape, f"{what} {name}: {value.shape}, {expected.shape}"
            raise_to(error, name, distance(value, expected))
            raise_to(largest, name, magnitude(expected))
        for layout in LAYOUTS:
            values = eager(seed, layout)
            truth = reference(seed, values)
            for name, value in judged(values):
                raise_to(allowed, name, distance(value, truth[name]))
    assert error, f"{what}: nothing was compared"
    for name, worst in error.items():
        slack = 2 * torch.finfo(dtypes[name]).eps * largest[name]
        bound = 2 * allowed[name] + slack
        assert worst <= bound, f"{what} {name}: error {worst:.3g} exceeds {bound:.3g}"


def judged(values: Values) -> Iterable[tuple[str, Tensor]]:
    """Everything but absent results and the masks a result carries for the reference's use."""
    return (
        (name, value)
        for name, value in values.items()
        if value is not None and not name.startswith("mask") and value.is_floating_point()
    )


def distance(value: Tensor, expected: Tensor) -> float:
    """max|value - expected| in fp64; NaN if either has one, so that no bound holds."""
    difference = (value.double() - expected.double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def magnitude(value: Tensor) -> float:
    """max|value|."""
    return value.double().abs().max().item() if value.numel() else 0.0


def raise_to(table: dict[str, float], name: str, value: float) -> None:
    """table[name] = max(table[name], value), NaN winning."""
    old = table.get(name, 0.0)
    table[name] = value if not value <= old else old


def cases(*axes: Iterable) -> list[tuple]:
    """The product of the axes."""
    return list(itertools.product(*axes))


def generator(seed: int, *salt: int) -> torch.Generator:
    """A generator for one case."""
    return torch.Generator().manual_seed(hash((seed, *salt)) % (1 << 63))
