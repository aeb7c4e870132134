"""An implementation of the ops, what it may be given, and its judgement by the rule of ``accuracy``."""

from __future__ import annotations

import contextlib
import functools
import math
import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import eager
import torch
from accuracy import DTYPES, LARGE_SHAPE, SEEDS, SHAPES, check, generator, lay_out

from ssp_fused import reference
from ssp_fused._layout import stage_dtype, statistics_dtype

COEFFICIENTS = (0.75, 0.25, -0.5, 1.0, 2 / 3, 0.1)


@dataclass(frozen=True)
class Implementation:
    """One implementation of the ops, and how much of the table it is given.

    Attributes:
        ops: Has each op as an attribute, with the signature of ``_ops.SCHEMAS``.
        unusable: Called before each test; None, or the reason why there is nothing to test here.
        device: Of the tensors that it takes. Its results are judged on the CPU, against plain PyTorch on the CPU:
            one yardstick for all, and none that depends on the libraries of a device.
        dtypes: Those of the table that it serves.
        shapes: All of the table, unless it is slow.
        seeds: All of the table, unless it is slow.
    """

    ops: Any
    unusable: Callable[[], str | None]
    device: str = "cpu"
    dtypes: Sequence[torch.dtype] = DTYPES
    shapes: Sequence[tuple[int, ...]] = (*SHAPES, LARGE_SHAPE)
    seeds: Sequence[int] = SEEDS

    def place(self, value: Any) -> Any:
        """An op's argument, with its tensors on the device: same values, strides and place in their buffers."""
        return each_tensor(self._place, value)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device == tensor.device.type:
            return tensor
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        buffer = tensor.as_strided((elements,), (1,), 0).to(self.device)
        return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def call(self, name: str, *arguments: Any) -> Any:
        """The op's results on the CPU, for arguments there."""
        results = getattr(self.ops, name)(*self.place(arguments))
        return each_tensor(torch.Tensor.cpu, results)


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
        self.affine = (self.gamma, self.beta)
        self.norm = (self.mean, self.rstd, *self.affine)


@functools.lru_cache(maxsize=64)
def inputs(seed, shape, dtype, layout, **options):
    return Inputs(seed, shape, dtype, layout, **options)


def over(shape, dtype, layout, build, **options):
    """arguments(seed, layout or None for the case's own)."""
    return lambda seed, other: build(inputs(seed, shape, dtype, other or layout, **options))


def each_tensor(function, value):
    """``value`` with ``function`` applied to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(function, v) for v in value)
    return value


def to_fp64(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_fp64(v) for v in value)
    return torch.float64 if isinstance(value, torch.dtype) else value


def judge(implementation, name, arguments, results, plain_arguments=None):
    """Compare ``name(*arguments(seed, layout))`` with the specification, result by result.

    Where rounding belongs to the arguments' meaning, the others are given ``plain_arguments``.
    """
    plain_arguments = plain_arguments or arguments
    op = getattr(implementation.ops, name)

    def named(values):
        values = values if isinstance(values, tuple) else (values,)
        return dict(zip(results, values, strict=True))

    def contender(seed):
        given = implementation.place(arguments(seed, None))
        out = named(op(*given))
        if seed == implementation.seeds[0]:
            for key, fake in named(on_fake_tensors(op, given)).items():
                assert out[key].dtype == fake.dtype, key
                assert out[key].shape == fake.shape, key
                assert out[key].stride() == fake.stride(), key
        return {key: value.cpu() for key, value in out.items()}

    def plain(seed, layout):
        return named(getattr(eager, name)(*plain_arguments(seed, layout)))

    @functools.cache
    def in_fp64(seed):
        with exact_sums():
            return named(getattr(reference, name)(*to_fp64(plain_arguments(seed, "planes"))))

    check(contender, plain, lambda seed, _: in_fp64(seed), name, implementation.seeds)


@contextlib.contextmanager
def exact_sums():
    """The specification's sums over a channel without rounding: in fp64 its own would be half of all there is."""

    def exact(value):
        values = value.movedim(1, 0).flatten(1).tolist()
        return torch.tensor([math.fsum(channel) for channel in values], dtype=value.dtype)

    with unittest.mock.patch.object(reference, "_sum_channels", exact):
        yield


def on_fake_tensors(op, arguments):
    with torch._subclasses.FakeTensorMode() as mode:
        return op(*each_tensor(mode.from_tensor, arguments))
