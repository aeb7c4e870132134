"""The documents' comparison on Fashion-MNIST: `python -m benchmarks.comparison [--jobs N] [--runs DIR] [--out DIR]`.

What `ssp-fused reproduce` makes of it with the reductions of a small machine, which stand in the table's caption.
Stopped at any time, the same command goes on with the runs; it writes fmnist.json and fmnist_growth.png into OUT.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ssp_fused._allocator import keep_freed_memory
from ssp_fused.adversarial import Comparison, reproduce
from ssp_fused.adversarial.comparison_figure import draw_comparison

from .arguments import positive
from .hardware import commit, machine

MODELS = ("res", "ssp2", "ssp3", "ark")
REDUCED = {"width": 8, "epochs": 4, "limit": 10_000, "growth_images": 1000}
AUTOATTACK_IMAGES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with the comparison, and write its results.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--jobs", type=positive, default=1, help="processes, which share the threads")
    add("--runs", type=Path, default=Path("runs/fmnist"), help="folder of the training runs")
    add("--out", type=Path, default=Path("."), help="folder of the results")
    add("--data-dir", help="folder of the IDX files")
    options = parser.parse_args(argv)
    keep_freed_memory()
    comparison = Comparison(
        "fmnist",
        models=MODELS,
        autoattack_images=AUTOATTACK_IMAGES,
        data_dir=options.data_dir,
        device="cpu",
        out=str(options.runs),
        **REDUCED,
    )
    commits = _commits(options.runs)
    write(reproduce(comparison, jobs=options.jobs), commits, options.out)
    return 0


def write(table: dict[str, Any], commits: Sequence[str], out: Path) -> None:
    """Write a table as `reproduce` returns it, with where it was made; and its figure."""
    here = machine(torch.device("cpu"))
    origin = {
        "command": "`python -m benchmarks.comparison`",
        "hardware": f"{here.cpu} ({here.instruction_set})",
        "commit": f"commit {', '.join(commits)}",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "fmnist.json").write_text(json.dumps({**table, **origin}, indent=1) + "\n")
    draw_comparison(out / "fmnist_growth.png", table)


def _commits(runs: Path) -> list[str]:
    """The commits that the runs are made with, this one included; kept beside their folder."""
    path = runs.with_name(f"{runs.name}-commits.json")
    found = json.loads(path.read_text()) if path.exists() else []
    found = list(dict.fromkeys([*found, commit() or "unknown"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
