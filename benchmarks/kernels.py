"""Each op, fused and not: `python -m benchmarks.kernels [--quick] [--out DIR]`.

Contenders are checked against the specification in fp64, then timed. "eager" is the specification's own expressions in
plain PyTorch, "compile-default" the same under torch.compile, "copy" a copy on the device of as many bytes as the op's
logical ones: the share of its bandwidth stands in the column /copy. Ops of several launches are there as a whole and
launch by launch. Writes kernels.csv into the folder, and prints a table per case.

On a GPU a time includes the launching where that takes the host longer than the device its work. With --graph every
contender but the copy is a CUDA graph, and the device's work alone is timed, the copy's too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ssp_fused
from ssp_fused import _backends, reference

from . import arguments
from .cases import CHANNELS_LAST, CONTIGUOUS, DTYPES, LAYOUTS
from .contenders import BACKENDS, copy_of, require
from .harness import CannotRunError, Contender, Task, Work
from .op_cases import SPECS, OpCase
from .results import CONTROL, COPY, EAGER

COMPILED = "compile-default"
NAMES = (EAGER, CONTROL, *(f"fused-{name}" for name in BACKENDS), COMPILED, COPY)
# 256 MiB an activation in fp32, wide and narrow.
SHAPES = ((1024, 64, 32, 32), (128, 640, 28, 28))
QUICK_SHAPES = ((4, 8, 8, 8),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 2 after a wrong contender, else 0.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0]
    )
    arguments.add_shared(parser, NAMES)
    parser.add_argument("--ops", nargs="+", choices=SPECS, default=list(SPECS), metavar="OP")
    parser.add_argument("--shapes", nargs="+", type=arguments.shape, metavar="NxCxHxW")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    options = parser.parse_args(argv)
    return arguments.run("kernels", parser, options, _tasks(options), base=COPY)


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    layouts = options.layouts or [CONTIGUOUS, CHANNELS_LAST]
    device = torch.device(options.device)
    for dtype in options.dtypes:
        for layout in layouts:
            for shape in shapes:
                for op in options.ops:
                    case = OpCase(op, shape, dtype, layout, device)
                    yield task(case, options.contenders, compiling=not options.quick)


def task(case: OpCase, names: Sequence[str] = NAMES, *, compiling: bool = True) -> Task:
    """The contenders of a case by name; ``compiling``: whether torch.compile may run, which takes its time."""
    built = [Contender(name, partial(_build, name, case, compiling)) for name in names]
    return Task("kernels", case.name, case.spec, case.device, case.bytes, built)


def _build(name: str, case: OpCase, compiling: bool) -> Work:
    if name == COPY:
        return copy_of(case.bytes, case.device)
    op = SPECS[case.spec].op
    if name in (EAGER, CONTROL):
        return _work(name, case, getattr(reference, op))
    if name != COMPILED:
        backend = name.removeprefix("fused-")
        require(backend, case.device)
        operands = [t for t in _tensors(case.arguments(0)) if t.is_floating_point()]
        with ssp_fused.use_backend(backend):
            try:
                chosen = _backends.select([op], operands)
            except RuntimeError as error:
                raise CannotRunError(str(error)) from error
        return _work(name, case, getattr(chosen.ops, op))
    if not compiling:
        raise CannotRunError("torch.compile was left out")
    torch._dynamo.reset()
    compiled = torch.compile(getattr(reference, op), fullgraph=True, dynamic=False)
    return _work(name, case, compiled)


def _work(name: str, case: OpCase, op: Callable[..., Any]) -> Work:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        return tuple(_tensors(case.arguments(seed)))

    template = case.arguments(0)

    def run(*tensors: Tensor) -> object:
        return op(*_filled(template, iter(tensors)))

    return Work(run, inputs, lambda: case.check(name, op))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _tensors(element)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The arguments with their tensors replaced, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)([_filled(element, tensors) for element in value])
    return value


if __name__ == "__main__":
    raise SystemExit(main())
