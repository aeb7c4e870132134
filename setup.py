"""Packaging; what is compiled, and how, is in tools/native_build.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

# Build front ends run this file without its own folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import native_build


class build_ext(_build_ext):  # noqa: N801, the name of the command
    """Builds the package's binaries, two of which are no Python extensions."""

    def run(self) -> None:
        """Build into the source tree if in place, else into the tree that a wheel is made of."""
        in_place = self.inplace or self.editable_mode
        target = native_build.PACKAGE if in_place else Path(self.build_lib, "ssp_fused").resolve()
        try:
            self.outputs = [str(path) for path in native_build.build(target)]
        except native_build.BuildError as error:
            sys.exit(f"ssp_fused: {error}")

    def get_outputs(self) -> list[str]:
        """Files that the command has written."""
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        """Files to copy for an editable installation: none, they are in place."""
        return {}


setup(
    # One declared extension makes the wheel one of this Python and platform.
    ext_modules=[Extension("ssp_fused._C", ["csrc/bindings.cpp"])],
    cmdclass={"build_ext": build_ext},
)
