"""Registers, spills, shared memory and widths of accesses of every kernel: `python -m benchmarks.kernel_resources`."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .harness import CannotRunError
from .resources import Resources

PROVIDERS = ("triton", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each kernel, variant and architecture; exit code 1 if there is none at all.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--backends", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args(argv)
    found = []
    for backend in options.backends:
        reason = "its library was not built with CUDA"
        count = len(found)
        try:
            for resources in rows(backend):
                print(line(resources), flush=True)
                found.append(resources)
        except CannotRunError as error:
            reason = str(error)
        if len(found) == count:
            print(f"{backend}: no kernels: {reason}")
    if options.csv and found:
        write(options.csv, found)
    return 0 if found else 1


def rows(backend: str) -> Iterator[Resources]:
    """What ``benchmarks.<backend>_resources`` finds.

    Raises:
        CannotRunError: That module cannot be imported, or cannot find out.
    """
    try:
        provider = importlib.import_module(f".{backend}_resources", __package__)
    except ImportError as error:
        raise CannotRunError(str(error)) from error
    yield from provider.rows()


def line(resources: Resources) -> str:
    """One kernel in words."""
    width = "?" if resources.access_bytes is None else resources.access_bytes
    return (
        f"{resources.arch:>7} {resources.backend:>7} {resources.kernel:<28}"
        f"{resources.registers:>4} registers {resources.spill_bytes:>4} B spilled"
        f"{resources.shared_bytes:>6} B shared, accesses of {width:>2} B  {resources.variant}"
    )


def write(path: Path, found: Sequence[Resources]) -> None:
    """The table as CSV."""
    names = [field.name for field in dataclasses.fields(Resources)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, found))


if __name__ == "__main__":
    raise SystemExit(main())
