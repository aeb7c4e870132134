"""Build the source distribution, a wheel from it, and try the wheel in an environment of its own: `make wheel`.

The wheel is installed with the versions of constraints.txt into a fresh virtual environment, and tried from another
folder, without a compiler on the path: `ssp-fused info`, and `tools/try_wheel.py`.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PIP = ("-m", "pip", "--disable-pip-version-check")
# What a wheel may hold, what it may not even then, and what it must.
ALLOWED = ("ssp_fused/*", "ssp_fused-*.dist-info/*")
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".o", ".pyc")
REQUIRED = (
    "ssp_fused/_lib/ops.so",
    "ssp_fused/_C.*.so",
    "ssp_fused/_build_info.json",
    "ssp_fused/_triton/*.py",
    "ssp_fused/data/*.gz",
    "ssp_fused/py.typed",
    "ssp_fused-*.dist-info/entry_points.txt",
    "ssp_fused-*.dist-info/licenses/LICENSE",
    "ssp_fused-*.dist-info/licenses/NOTICE",
)


def problems(names: Iterable[str]) -> list[str]:
    """What is wrong with a wheel that has files of these names."""
    names = list(names)
    foreign = [
        name
        for name in names
        if name.endswith(SOURCES) or not any(fnmatch.fnmatch(name, known) for known in ALLOWED)
    ]
    lacking = [known for known in REQUIRED if not fnmatch.filter(names, known)]
    return [f"must not hold {name}" for name in foreign] + [f"lacks {name}" for name in lacking]


def source_distribution(tree: Path, folder: Path) -> Path:
    """Build that of a source tree into ``folder``."""
    call = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _run(sys.executable, "-c", call, folder, cwd=tree, stdout=subprocess.DEVNULL)
    return _newest(folder, "ssp_fused-*.tar.gz")


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def main() -> int:
    """Build and try; the wheel stays in the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    folder = parser.parse_args().out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = source_distribution(ROOT, folder)
    # pip's cache would give back the wheel of an earlier archive of the same name.
    options = ("--no-cache-dir", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    _run(sys.executable, *PIP, "wheel", *options, source)
    wheel = _newest(folder, "ssp_fused-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = problems(name for name in archive.namelist() if not name.endswith("/"))
    if found:
        sys.exit("\n".join(f"{wheel.name}: {problem}" for problem in found))
    with tempfile.TemporaryDirectory() as elsewhere:
        _try(wheel, Path(elsewhere))
    print(f"built and tried: {wheel}")
    return 0


def _try(wheel: Path, folder: Path) -> None:
    """Install into a fresh environment, and use from ``folder`` with nothing else on the path."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    _run(programs / "python", *PIP, "install", "--quiet", "--constraint", CONSTRAINTS, wheel)
    alone = {"PATH": str(programs), "HOME": str(folder)}
    _run(programs / "ssp-fused", "info", cwd=folder, env=alone)
    _run(programs / "python", "-I", ROOT / "tools" / "try_wheel.py", cwd=folder, env=alone)


def _run(*command: str | Path, **options: object) -> None:
    done = subprocess.run([str(word) for word in command], check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
