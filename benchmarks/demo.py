"""`make demo`'s results for the documents, with the machine: `python -m benchmarks.demo [--out DIR]`.

Writes demo.json and demo.png into the folder; the runs are below it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ssp_fused import demo

from .hardware import machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo on the CPU.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    out = parser.parse_args(argv).out
    runs = out / "runs"
    demo.main(["--out", str(runs), "--device", "cpu"])
    found = json.loads((runs / demo.RESULTS).read_text())
    found["machine"] = dataclasses.asdict(machine(torch.device("cpu")))
    (out / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    if (runs / "demo.png").exists():
        shutil.copyfile(runs / "demo.png", out / "demo.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
