"""A step through a chain of SSP blocks, fused and not: `python -m benchmarks.blocks [--quick] [--out DIR]`.

"train" is forward, and backward to all parameters and the input, with batch statistics; "input-gradient" is what an
attack does on a frozen network in evaluation mode. Writes blocks.csv into the folder, and prints a table per case.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from ssp_fused import schemes

from . import arguments
from .cases import CHANNELS_LAST, CONTIGUOUS, DIRECTIONS, DTYPES, LAYOUTS, Case
from .contenders import NAMES, contenders
from .harness import Task

# The paper's three groups of CIFAR blocks, and a wide one.
SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (16, 160, 32, 32))
QUICK_SHAPES = ((4, 8, 8, 8),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 2 after a wrong contender, else 0.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blocks", description=__doc__.splitlines()[0]
    )
    arguments.add_shared(parser, NAMES)
    parser.add_argument("--schemes", nargs="+", choices=schemes.names(), default=["ssp22", "ssp33"])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=arguments.shape,
        metavar="NxCxHxW",
        help="default: the paper's, and one wide",
    )
    parser.add_argument("--blocks", type=arguments.positive, default=1, help="length of the chain")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    options = parser.parse_args(argv)
    return arguments.run("blocks", parser, options, _tasks(options))


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    layouts = options.layouts or ([CONTIGUOUS] if options.quick else [CONTIGUOUS, CHANNELS_LAST])
    device = torch.device(options.device)
    for dtype in options.dtypes:
        for layout in layouts:
            for shape in shapes:
                for scheme in options.schemes:
                    for direction in options.directions:
                        chain = (scheme, shape, options.blocks, dtype, layout)
                        yield _task(Case(*chain, direction, device), options)


def _task(case: Case, options: argparse.Namespace) -> Task:
    return Task(
        benchmark="blocks",
        case=case.name,
        direction=case.direction,
        device=case.device,
        bytes=case.logical_bytes(),
        contenders=contenders(case, options.contenders, compiling=not options.quick),
    )


if __name__ == "__main__":
    raise SystemExit(main())
