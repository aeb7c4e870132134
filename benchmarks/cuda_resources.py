"""Resources of the CUDA kernels: what ptxas said when the library was built in this tree.

Widths of accesses are read from the machine code, which takes cuobjdump and nvdisasm: both beside
nvcc, on PATH, or in Triton's package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssp_fused import _extension
from tools import native_build

from .resources import Resources

KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SHARED = re.compile(r"(\d+) bytes smem")
PLACE = re.compile(r"Function : (?P<symbol>\w+)|arch = (?P<arch>\w+)")
ACCESS = re.compile(r"\b(?:LDG|STG)\S*")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b")


def rows() -> Iterator[Resources]:
    """Every kernel in every specialisation and architecture; none where no library was built."""
    compiled = dict(kernels())
    widths = (
        access_widths(native_build.PACKAGE / native_build.outputs()["_cuda"]) if compiled else {}
    )
    for place, resources in compiled.items():
        yield dataclasses.replace(resources, access_bytes=widths.get(place))


def kernels() -> Iterator[tuple[tuple[str, str], Resources]]:
    """What the compiler said of each kernel, by (architecture, symbol); the width is not known to it."""
    if not _extension.build_info()["cuda"]["built"]:
        return
    folder = native_build.object_folder(native_build.Torch.installed())
    logs = sorted(folder.glob("cuda/*.cu.o.log"))
    found = [match for log in logs for match in KERNEL.finditer(log.read_text())]
    names = demangled([match["symbol"] for match in found])
    for match, name in zip(found, names, strict=True):
        kernel, _, variant = name.partition("<")
        shared = SHARED.search(match["rest"])
        yield (
            (match["arch"], match["symbol"]),
            Resources(
                backend="cuda",
                kernel=kernel,
                variant=variant.removesuffix(">"),
                arch=match["arch"],
                registers=int(match["registers"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
                shared_bytes=int(shared[1]) if shared else 0,
                access_bytes=None,
            ),
        )


def demangled(symbols: Sequence[str]) -> list[str]:
    """Names of functions with their template arguments, without namespaces and parameters."""
    text = subprocess.run(
        ["c++filt", "--no-params"],
        input="\n".join(symbols),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # A template's name comes with its return type.
    return [
        re.sub(r"^void |ssp::|\(anonymous namespace\)::", "", line) for line in text.splitlines()
    ]


def access_widths(library: Path) -> dict[tuple[str, str], int]:
    """Bytes of the widest global load or store of each kernel, by (architecture, symbol).

    Empty where there is no cuobjdump.
    """
    tool = find_cuobjdump()
    if tool is None:
        return {}
    path = os.pathsep.join([str(tool.parent), os.environ.get("PATH", "")])
    command = [tool, "-sass", library]
    code = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout
    widths: dict[tuple[str, str], int] = {}
    arch = symbol = ""
    for line in code.splitlines():
        if match := PLACE.search(line):
            arch, symbol = match["arch"] or arch, match["symbol"] or symbol
        elif access := ACCESS.search(line):
            bits = WIDTH.search(access[0])
            width = int(bits[1]) // 8 if bits else 4
            widths[arch, symbol] = max(width, widths.get((arch, symbol), 0))
    return widths


def find_cuobjdump() -> Path | None:
    """The disassembler, if there is one."""
    folders = []
    with contextlib.suppress(native_build.LeftOut):
        folders.append(native_build.toolkit(native_build.find_nvcc(os.environ)) / "bin")
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    return Path(found) if found else None
