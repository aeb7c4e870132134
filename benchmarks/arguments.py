"""The command line that all benchmarks share, and the run that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ssp_fused._allocator import keep_freed_memory

from . import figures, results
from .hardware import machine
from .harness import MIN_REPEATS, Settings, Task, measure

QUICK_REPEATS = 3
DEFAULT_OUT = Path("runs/benchmarks")


def add_shared(
    parser: argparse.ArgumentParser, contenders: Sequence[str], *, least: int = MIN_REPEATS
) -> None:
    """Add the options that are not about what is measured; ``least`` as in :func:`run`."""
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=contenders,
        default=list(contenders),
        metavar="NAME",
        help=f"of {', '.join(contenders)}; default: all",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default here: {device}")
    parser.add_argument(
        "--repeats",
        type=positive,
        help=f"default and least: {least}; {QUICK_REPEATS} with --quick",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order in each repeat")
    parser.add_argument(
        "--cold", action="store_true", help="rotate inputs past the last-level cache"
    )
    parser.add_argument(
        "--graph", action="store_true", help="replay CUDA graphs: times without launching"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny, and nothing compiled: does it run?"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help=f"folder; default: {DEFAULT_OUT}"
    )
    parser.add_argument("--figure", action="store_true", help="draw the ratios, too")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD.csv", "NEW.csv"),
        help="measure nothing: print the ratios of two result files",
    )


def positive(text: str) -> int:
    """A whole number from 1, as an argument's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """NxCxHxW, as an argument's type."""
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be NxCxHxW, such as 128x16x32x32; got {text!r}")
    return tuple(map(int, sizes))


def run(
    benchmark: str,
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    tasks: Iterable[Task],
    *,
    base: str = results.EAGER,
    least: int = MIN_REPEATS,
    warmup: int = Settings.warmup,
    loops: bool = False,
) -> int:
    """Compare two files, or measure the tasks: print and write each as soon as it is done.

    Args:
        benchmark: Its name, which is that of its files.
        parser: Of the options.
        options: With those of :func:`add_shared`.
        tasks: What is measured.
        base: The contender to which a figure draws ratios.
        least: Repeats that a result must have at least.
        warmup: Calls before them.
        loops: Whether each timed call comes after another of the same contender.

    Returns:
        The exit code: 2 if a contender was wrong, else 0. Bad options end the process through ``parser.error``.
    """
    if options.compare:
        return _compare(parser, options.compare)
    settings = _settings(parser, options, base, least, warmup, loops)
    keep_freed_memory()  # else page faults are measured, of every contender
    provenance = machine(torch.device(options.device))
    path = options.out / f"{benchmark}.csv"
    rows: list[results.Row] = []
    for task in tasks:
        found = measure(task, settings)
        print(results.table(found), end="\n\n", flush=True)
        rows += found
        results.write(path, rows, provenance)
    if options.figure:
        figures.draw_ratios(path.with_suffix(".svg"), rows, base)
    print(f"written: {path}")
    return 2 if any(row.status.startswith(results.WRONG) for row in rows) else 0


def _compare(parser: argparse.ArgumentParser, paths: Sequence[Path]) -> int:
    try:
        old, new = ([row for row, _ in results.read(path)] for path in paths)
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")
    print("\n".join(results.compare(old, new)))
    return 0


def _settings(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    base: str,
    least: int,
    warmup: int,
    loops: bool,
) -> Settings:
    least = QUICK_REPEATS if options.quick else least
    repeats = options.repeats or least
    if repeats < least:
        parser.error(f"--repeats must be at least {least} here, got {repeats}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.graph and device.type != "cuda":
        parser.error(f"--graph needs a cuda device, got {device}")
    if options.figure and base not in options.contenders:
        parser.error(f"--figure needs the contender {base!r}, got {options.contenders}")
    return Settings(
        repeats=repeats,
        warmup=1 if options.quick else warmup,
        seed=options.seed,
        cold=options.cold,
        graph=options.graph,
        loops=loops,
    )
