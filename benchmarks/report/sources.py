"""The committed result files, and the command that makes each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.hardware import Machine
from benchmarks.results import Row

RESULTS = Path("benchmarks", "results")
FIGURE_FOLDER = Path("docs", "figures")
CPU, GPU = "cpu", "gpu"

# The file's name without its device, and the command that measures it.
_KERNELS = "OMP_NUM_THREADS=1 python -m benchmarks.kernels --device cpu --cold"
_ON_GPU = "--device cuda --graph --dtypes bfloat16 --layouts channels_last"
_PAPER = "128x16x32x32 128x32x16x16 128x64x8x8"
COMMANDS = {
    CPU: {
        "memory": "python -m benchmarks.memory",
        "blocks": "python -m benchmarks.blocks --device cpu",
        "kernels": f"{_KERNELS} --shapes 32x16x32x32 --layouts channels_last",
        "adversarial": "python -m benchmarks.adversarial --device cpu",
    },
    GPU: {
        "blocks": f"python -m benchmarks.blocks {_ON_GPU} --schemes ssp33 --shapes {_PAPER}",
        "kernels": f"python -m benchmarks.kernels {_ON_GPU} --shapes 2048x64x32x32",
        "adversarial": "python -m benchmarks.adversarial --device cuda --amp bfloat16 --layouts channels_last",
    },
}


@dataclass(frozen=True)
class Source:
    """A result file.

    Attributes:
        entries: Rows, each with the machine that it was measured on.
        command: That measures it.
        link: From the document to the file.
    """

    entries: Sequence[tuple[Row, Machine]]
    command: str
    link: str

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for row, _ in self.entries]

    def provenance(self, rows: Sequence[Row]) -> str:
        """Command, hardware, versions, commits and days of some of the rows, and a link, as Markdown."""
        keys = {row.key for row in rows}
        machines = [machine for row, machine in self.entries if row.key in keys]
        return f"`{self.command}`; {provenance_of(machines)}; [results]({self.link})"


def provenance_of(machines: Sequence[Machine]) -> str:
    """Hardware, versions, commits and days."""
    where = ", ".join(dict.fromkeys(map(_hardware, machines)))
    torch = " and ".join(dict.fromkeys(m.torch for m in machines))
    commits = ", ".join(dict.fromkeys(m.commit for m in machines))
    days = " and ".join(dict.fromkeys(m.date[:10] for m in machines))
    return f"{where}, torch {torch}, commit {commits}, {days}"


def _hardware(machine: Machine) -> str:
    if machine.gpu:
        return f"{machine.gpu}, driver {machine.driver}, Triton {machine.triton}"
    cpu = re.sub(r"\((?:R|TM)\)", "", machine.cpu)
    threads = "1 thread" if machine.threads == "1" else f"{machine.threads} threads"
    return f"{cpu} ({machine.instruction_set}), {threads}"


class Sources:
    """Result files, as seen from a document.

    Args:
        root: Of the repository.
        folder: Of the document.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder = root, folder

    def get(self, benchmark: str, device: str) -> Source | None:
        """A benchmark's results on a CPU or a GPU; None where there are none.

        Raises:
            ValueError: The file is none of results, or has no rows.
        """
        path = self.path(f"{benchmark}_{device}.csv")
        if not path.is_file():
            return None
        found = results.read(path)
        if not found:
            raise ValueError(f"{path}: must have rows, got none")
        return Source(found, COMMANDS[device][benchmark], self.link(path))

    def path(self, name: str) -> Path:
        """Of a result file."""
        return self._root / RESULTS / name

    def figure(self, name: str, title: str) -> str:
        """A figure of the report, as Markdown."""
        return f"![{title}]({self.link(self._root / FIGURE_FOLDER / name)}.svg)"

    def link(self, path: Path) -> str:
        """From the document to a file."""
        return Path(os.path.relpath(path, self._folder)).as_posix()
