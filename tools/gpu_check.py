"""Build with the torch and nvcc at hand, without network, and run the tests that want a GPU.

Writes ``gpu_check.json`` (machine, versions, commit, results of each group) into the folder given,
with the build's and pytest's own output beside it, and ends in one line per group. The exit status
is 0 only if every group asked for passed, and each that wants a GPU passed at least one test. Only
compute-sanitizer's groups may be left out, where it is not installed; the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The table of the ops is cut where Triton has about as many kernels to compile: groups run side by side.
TABLE = "tests/gpu/test_ops_gpu.py"
GROUPS = {
    "triton-forward": [TABLE, "-k", "TestTriton and stage and not group"],
    "triton-group-norm": [TABLE, "-k", "TestTriton and stage and group"],
    "triton-group-norm-backward": [TABLE, "-k", "TestTriton and group_norm_act_backward"],
    "triton-rest": [TABLE, "-k", "TestTriton and not stage and not group_norm_act_backward"],
    "cuda": [TABLE, "-k", "TestCuda"],
    "execution": ["tests/gpu/test_execution_gpu.py", "-k", "not large"],
    "large": ["tests/gpu/test_execution_gpu.py", "-k", "large"],
    "chains": ["tests/gpu/test_chains_gpu.py"],
    "attacks": ["tests/gpu/test_graphs_cuda.py"],
    "build": ["tests/test_build.py"],
    "math": ["tests/test_math.py"],
}
SMALL = "2x3x5x7 and (planes or rows) and (float32 or bfloat16)"
# compute-sanitizer's tools: a few small cases of each op. Triton's kernels share no memory by hand.
SANITIZED = {
    "memcheck": [TABLE, "-k", SMALL],
    "racecheck": [TABLE, "-k", f"TestCuda and {SMALL}"],
    "initcheck": [TABLE, "-k", f"TestCuda and {SMALL}"],
}
ON_GPU = set(GROUPS) - {"build", "math"} | set(SANITIZED)
AT_ONCE = max(4, (os.cpu_count() or 1) // 2)
# Of pytest-xdist, where it is installed, for a group of the table.
PROCESSES = max(1, (os.cpu_count() or 1) // 4)
ERROR_STATUS = 9
TIMED_OUT = 124
GRACE = 30  # seconds in which a group that ran too long may report


def printed(command: list[str]) -> str | None:
    """What a command prints, or None where it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def machine() -> dict:
    """The GPU, the versions and the commit that the results belong to."""
    import torch

    smi = printed(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "driver": smi.splitlines()[0].split(", ")[-1] if smi else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": printed(["git", "rev-parse", "HEAD"]),
        "modified": bool(printed(["git", "status", "--porcelain"])),
    }


def run(
    command: list[str], log: Path, timeout: float | None = None, **variables: str
) -> tuple[int, float]:
    """Run a command in the source tree, its output into ``log``: exit status and seconds.

    After ``timeout`` seconds it is interrupted, so that it reports what it has, and a little later killed.
    """
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **variables}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status = TIMED_OUT
    return status, round(time.monotonic() - start, 1)


def run_group(name: str, out: Path, timeout: float | None) -> dict:
    """Run one group of tests and count its results."""
    report = out / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    variables = {"OMP_NUM_THREADS": "2"}
    if name in SANITIZED:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            return {"ok": True, "not_run": "compute-sanitizer is not on PATH"}
        options = ["--tool", name, f"--error-exitcode={ERROR_STATUS}", "--target-processes=all"]
        command = [sanitizer, *options, *command, *SANITIZED[name]]
        # Each tensor is an allocation of its own, so that its end is known.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    else:
        command += GROUPS[name]
        if TABLE in command and importlib.util.find_spec("xdist"):
            command += ["-n", str(PROCESSES)]
    status, seconds = run(command, out / f"{name}.log", timeout, **variables)
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    if report.is_file():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {key: int(suite.get(key, 0)) for key in counts}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {
        "ok": status == 0 and (passed > 0 or name not in ON_GPU),
        "passed": passed,
        "failed": failed,
        "skipped": counts["skipped"],
        "timed_out": status == TIMED_OUT,
        "seconds": seconds,
    }


def run_groups(names: list[str], out: Path, timeout: float | None) -> dict[str, dict]:
    """Results of the groups, of which several run at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = pool.map(lambda name: run_group(name, out, timeout), names)
        return dict(zip(names, results, strict=True))


def described(group: dict) -> str:
    """A group's results in words."""
    if "not_run" in group:
        return f"not run: {group['not_run']}"
    verdict = "ok" if group["ok"] else "FAILED"
    counts = ", ".join(f"{group[key]} {key}" for key in ("passed", "failed", "skipped"))
    stopped = ", stopped" if group["timed_out"] else ""
    return f"{verdict}, {counts}, {group['seconds']} s{stopped}"


def main() -> int:
    """Build, test, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*GROUPS, *SANITIZED]
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--groups", nargs="+", choices=names, default=names, metavar="GROUP")
    parser.add_argument("--timeout", type=float, help="seconds after which a group is stopped")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tools" / "native_build.py")]
    status, seconds = run(command, out / "compile.log", SSP_FUSED_CUDA="1")
    report = {"machine": machine(), "compile": {"ok": status == 0, "seconds": seconds}}
    if status == 0:
        report["build_info"] = json.loads((ROOT / "ssp_fused" / "_build_info.json").read_text())
        groups = run_groups(options.groups, out, options.timeout)
    else:
        print((out / "compile.log").read_text(), end="")
        groups = {}
    report["groups"] = groups
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["machine"]))
    if report["machine"]["gpu"] is None:
        print("no test can pass on a GPU: torch sees none")
    print(f"compile: {'ok' if status == 0 else 'FAILED'}, {seconds} s")
    for name, group in groups.items():
        print(f"{name}: {described(group)}")
    return 0 if groups and all(group["ok"] for group in groups.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
