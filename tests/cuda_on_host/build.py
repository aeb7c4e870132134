"""Compiles the CUDA library for the CPU: its own sources, by a C++ compiler, on the emulator.

The result is a Python module (module.cpp) that registers the library's ops for CPU tensors.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import native_build

HERE = Path(__file__).resolve().parent
NAME = "ssp_fused_emulated"
# The device's and the dispatcher's part of the library, for which module.cpp stands in.
REPLACED = ("current.cpp", "register.cpp")
FLAGS = ["-O1", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off"]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Patch:
    """A change of one source file, ``old`` to ``new``, that the ``units`` are compiled again for."""

    file: str
    old: str
    new: str
    units: tuple[str, ...]

    def apply(self, csrc: Path) -> None:
        """Change the file in a copy of csrc; ``old`` must be there exactly once."""
        path = csrc / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} of {self.old!r}, not one")
        path.write_text(text.replace(self.old, self.new))


def missing() -> str | None:
    """Why the module cannot be built here, if it cannot."""
    try:
        native_build.find_cxx(os.environ)
        native_build.find_nvcc(os.environ)
    except native_build.LeftOut as reason:
        return str(reason)
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def build(sanitize: bool = False) -> Path:
    """The module of the sources as they are, up to date; its object files are kept in build/."""
    folder = _folder(sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    # Several test processes may want it at once.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan = native_build.Plan(folder, folder)
        command = _command(native_build.CSRC, sanitize)
        for source in _sources():
            plan.compile(command, source)
        return _link(plan, [step.output for step in plan.steps], sanitize)


def build_patched(patch: Patch, folder: Path, sanitize: bool = False) -> Path:
    """The module with one file changed, in ``folder``."""
    build(sanitize)
    csrc = folder / "csrc"
    shutil.copytree(native_build.CSRC, csrc)
    patch.apply(csrc)
    plan = native_build.Plan(folder, folder)
    command = _command(csrc, sanitize)
    units = [csrc / "cuda" / unit for unit in patch.units]
    # The linker keeps the first of several definitions of an inline function.
    objects = [plan.compile(command, unit) for unit in units]
    kept = native_build.Plan(folder, _folder(sanitize))
    objects += [kept.compile([], source) for source in _sources() if source.name not in patch.units]
    return _link(plan, objects, sanitize)


def _folder(sanitize: bool) -> Path:
    torch = native_build.Torch.installed().version
    return native_build.ROOT / "build" / f"{NAME}-torch-{torch}{'-sanitized' * sanitize}"


def _sources() -> list[Path]:
    library = [path for path in native_build.CSRC.glob("cuda/*.c*") if path.suffix != ".cuh"]
    return [path for path in sorted(library) if path.name not in REPLACED] + sorted(
        HERE.glob("*.cpp")
    )


def _cxx(sanitize: bool) -> list[str]:
    return [*native_build.find_cxx(os.environ), *(SANITIZERS if sanitize else [])]


def _command(csrc: Path, sanitize: bool) -> list[str]:
    import pybind11

    cuda = native_build.toolkit(native_build.find_nvcc(os.environ)) / "include"
    flags = [native_build.STANDARD, *FLAGS, *native_build.HIDDEN, *native_build.STABLE_ABI]
    system = [cuda, pybind11.get_include(), sysconfig.get_path("include")]
    includes = [option for path in system for option in ("-isystem", str(path))]
    includes += native_build.Torch.installed().include
    kernels = ["-DUSE_CUDA", "-include", str(HERE / "emulator.h"), "-x", "c++"]
    return [*_cxx(sanitize), *flags, f"-I{csrc}", *includes, *kernels]


def _link(plan: native_build.Plan, objects: Sequence[Path], sanitize: bool) -> Path:
    output = plan.target / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = [*map(str, objects), "-o", str(output)]
    libraries = native_build.Torch.installed().libraries
    command = [*_cxx(sanitize), "-shared", *files, *libraries]
    plan.steps.append(native_build.Step(command, list(objects), output, is_link=True))
    native_build.run(plan, os.environ)
    return output
