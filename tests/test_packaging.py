"""What is handed to users: the source distribution, the wheel's contents, the version."""

import re
import shutil
import subprocess
import tarfile

import pytest

from ssp_fused import _version
from tools import make_wheel

ROOT = make_wheel.ROOT
GOOD = [
    *(
        "ssp_fused/__init__.py",
        "ssp_fused/_C.cpython-311-x86_64-linux-gnu.so",
        "ssp_fused/_lib/ops.so",
    ),
    *("ssp_fused/_build_info.json", "ssp_fused/_triton/ops.py", "ssp_fused/data/digits.csv.gz"),
    *("ssp_fused/py.typed", "ssp_fused-0.1.0.dist-info/entry_points.txt"),
    *(f"ssp_fused-0.1.0.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")),
]


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == _version.__version__


def test_the_source_distribution_is_the_tree(tmp_path):
    """All that is tracked but hidden files, and nothing that a build leaves."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git repository")
    tracked = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    tree = tmp_path / "tree"
    for name in (*tracked, "ssp_fused/_lib/ops.so", "ssp_fused/_build_info.json"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copy(ROOT / name, tree / name)
        else:
            (tree / name).write_text("of a build")
    source = make_wheel.source_distribution(tree, tmp_path)
    assert source.name == f"ssp_fused-{_version.__version__}.tar.gz"
    with tarfile.open(source) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert found - made == {name for name in tracked if not name.startswith(".")}


def test_a_good_wheel_has_no_problems():
    assert make_wheel.problems(GOOD) == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_ops.py",
        "benchmarks/blocks.py",
        "csrc/ops.h",
        "tools/native_build.py",
        "setup.py",
        "ssp_fused/_lib/ops.o",
        "ssp_fused/kernel.cu",
        "ssp_fused/__pycache__/nn.cpython-311.pyc",
    ],
)
def test_leftovers_in_a_wheel_are_named(name):
    assert make_wheel.problems([*GOOD, name]) == [f"must not hold {name}"]


@pytest.mark.parametrize("missing", GOOD[1:])
def test_what_a_wheel_lacks_is_named(missing):
    (problem,) = make_wheel.problems(name for name in GOOD if name != missing)
    assert problem.startswith("lacks ")
