"""The machine, the versions and the commit that a measurement belongs to."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from ssp_fused import __version__, _extension

ROOT = Path(__file__).resolve().parent.parent
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE = 64 << 20  # where the system does not tell: more than most processors have


@dataclass(frozen=True)
class Machine:
    """Provenance of a measurement; empty where there is none.

    Attributes:
        instruction_set: of the CPU kernels.
        threads: of torch.
        commit: of the source tree, with "-dirty" where files other than results differ from it.
        date: UTC, to the second.
    """

    cpu: str
    instruction_set: str
    threads: str
    gpu: str
    driver: str
    torch: str
    ssp_fused: str
    triton: str
    python: str
    commit: str
    date: str


def machine(device: torch.device) -> Machine:
    """Where and with what a measurement on ``device`` runs, now."""
    on_gpu = device.type == "cuda"
    return Machine(
        cpu=processor(),
        instruction_set=_extension.cpu_isa() or "",
        threads=str(torch.get_num_threads()),
        gpu=torch.cuda.get_device_name(device) if on_gpu else "",
        driver=_driver() if on_gpu else "",
        torch=torch.__version__,
        ssp_fused=__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        commit=commit() or "",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def processor() -> str:
    """The CPU's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree, "-dirty" where it was changed; None outside a repository.

    Result files count as no change: one benchmark's output does not make the next one's tree dirty.
    """
    head = _printed("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _printed("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changed else head


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between ``device`` and its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return max(known, default=_ASSUMED_CACHE)


def _driver() -> str:
    listed = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _printed(*command: str) -> str:
    """What a command prints; empty where it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
