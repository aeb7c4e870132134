"""Every launch of the Triton kernels, compiled for each architecture: `python -m benchmarks.triton_every`.

The tests compile a few that make every choice between them (`triton_resources.covering`). Two cores compile
about five a second. What is compiled is written to --out as it comes, and not compiled again by the next call while
the kernel, its options, the bounds and Triton are the same. A line for each kernel and architecture is printed and
written to --summary.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from . import hardware, triton_bounds, triton_resources
from .triton_resources import ARCHS, Launch

COLUMNS = (
    "kernel",
    "arch",
    "variant",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "access_bytes",
    "dense",
    "broken",
    "sources",
)
SUMMARY = (
    "kernel",
    "arch",
    "launches",
    "dense_launches",
    "broken",
    "most_registers",
    "most_spill_bytes",
    "most_shared_bytes",
    "triton",
    "commit",
)
_launches: list[Launch] = []  # of the parent, for its workers


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what is missing; exit code 2 if a kernel does not keep to the bounds.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_every", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a row for each kernel that was compiled"
    )
    parser.add_argument("--summary", type=Path, help="a row for each kernel and architecture")
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHS), metavar="ARCH")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    _launches[:] = triton_resources.launches()
    found = every(options.out, options.archs, options.jobs)
    rows = list(summary(found))
    for row in rows:
        print(
            f"{row['arch']:>7} {row['kernel']:<28}{row['launches']:>6} launches, "
            f"{row['dense_launches']:>5} on dense paths, {row['broken']} out of bounds; at most "
            f"{row['most_registers']} registers, {row['most_spill_bytes']} B spilled, "
            f"{row['most_shared_bytes']} B shared"
        )
    if options.summary:
        write(options.summary, SUMMARY, rows)
    return 2 if any(row["broken"] for row in rows) else 0


def every(out: Path, archs: Sequence[int], jobs: int) -> list[dict]:
    """The rows of all launches for these architectures: those in ``out``, and the missing ones, appended to it."""
    wanted = {
        (launch.name, f"sm_{arch}", launch.variant): (index, arch)
        for arch in archs
        for index, launch in enumerate(_launches)
    }
    judged_by = (Path(triton_bounds.__file__).read_text(), metadata.version("triton"))
    now = {(launch.name, launch.variant): sources(launch, judged_by) for launch in _launches}
    old = []
    if out.exists():
        with out.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["sources"] == now.get((row["kernel"], row["variant"])):
                    old.append(row)
    write(out, COLUMNS, old)
    rows = [row for row in old if wanted.pop(_key(row), None)]
    print(f"{len(rows)} kernels are compiled already, {len(wanted)} are to be", flush=True)
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))
    with pool, out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for done in as_completed(pool.submit(_compiled, *task) for task in wanted.values()):
            row = done.result()
            rows.append(row | {"sources": now[row["kernel"], row["variant"]]})
            writer.writerow(rows[-1])
            file.flush()
    return rows


def _key(row: dict) -> tuple[str, str, str]:
    return row["kernel"], row["arch"], row["variant"]


def _compiled(index: int, arch: int) -> dict:
    launch = _launches[index]
    with triton_resources.target(arch):
        found = triton_resources.compiled(launch, arch)
    row = {name: value for name, value in asdict(found.resources).items() if name in COLUMNS}
    dense = int(triton_bounds.is_dense_path(launch))
    return row | {"dense": dense, "broken": "; ".join(triton_bounds.broken(launch, found))}


def summary(rows: Sequence[dict]) -> Iterator[dict]:
    """A line for each kernel and architecture, in order."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["arch"]].append(row)
    versions = {"triton": metadata.version("triton"), "commit": hardware.commit() or ""}
    for (kernel, arch), own in sorted(
        groups.items(), key=lambda item: (item[0][0], len(item[0][1]), item[0][1])
    ):
        yield {
            "kernel": kernel,
            "arch": arch,
            "launches": len(own),
            "dense_launches": sum(int(row["dense"]) for row in own),
            "broken": sum(bool(row["broken"]) for row in own),
            **{
                f"most_{name}": max(int(row[name]) for row in own)
                for name in ("registers", "spill_bytes", "shared_bytes")
            },
            **versions,
        }


def sources(launch: Launch, judged_by: tuple[str, str]) -> str:
    """A digest of what a row follows from, beside the arguments: kernel, options, bounds and the version of Triton."""
    from ssp_fused._triton import operands

    options = sorted(operands.compile_options(launch.warps, launch.registers).items())
    # The key is of the kernel's text and of all that it calls.
    parts = (launch.kernel.cache_key, options, *judged_by)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def write(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
