"""Writes the tables and figures of the documents from the result files: `python -m benchmarks.report [--check]`.

Tables stand in README.md and docs/*.md between `<!-- benchmarks.report: NAME -->` and `<!-- end -->`, figures are
docs/figures/*.svg. No number in either is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.hardware import ROOT

from .charts import FIGURES
from .documents import MarkerError, filled
from .sections import SECTIONS
from .sources import FIGURE_FOLDER, Sources


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write what has changed, or with ``--check`` name it and end with 1.

    Args:
        argv: What stands behind the program's name; that of the process if None.
        root: Of the documents and the result files.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing: exit with 1 where a file is stale"
    )
    options = parser.parse_args(argv)
    try:
        fresh = _texts(root)
    except (MarkerError, ValueError) as error:
        parser.error(str(error))
    stale = [path for path, text in fresh.items() if _written(path) != text]
    for path in stale:
        if options.check:
            print(
                f"stale: {path.relative_to(root)}: run python -m benchmarks.report", file=sys.stderr
            )
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fresh[path])
        print(f"written: {path.relative_to(root)}")
    return 1 if stale and options.check else 0


def _texts(root: Path) -> dict[Path, str]:
    """What each document and figure should hold."""
    found = {}
    for path in (root / "README.md", *sorted(root.glob("docs/*.md"))):
        sources = Sources(root, path.parent)
        sections = {name: partial(section, sources) for name, section in SECTIONS.items()}
        found[path] = filled(path.read_text(), sections, str(path.relative_to(root)))
    for name, draw in FIGURES.items():
        chart = draw(Sources(root, root / FIGURE_FOLDER))
        if chart is not None:
            found[root / FIGURE_FOLDER / f"{name}.svg"] = chart
    return found


def _written(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


if __name__ == "__main__":
    raise SystemExit(main())
