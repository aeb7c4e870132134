"""Plan and run the compilation of the package's binaries: CPU ops, CUDA ops and the ``_C`` module.

``setup.py`` calls :func:`build`. ``python tools/native_build.py`` does the same into the source
tree without setuptools, for machines that have no package index to install from. Nothing here
imports torch: its headers and libraries are found by path, so that another one can be named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "ssp_fused"

OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)  # the first with C++20, which torch's headers need
STANDARD = "-std=c++20"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# Without contraction every instruction set computes the same bits.
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
HIDDEN = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
COMMON = ["-DNDEBUG", "-Wall", "-Wextra", *HIDDEN]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
PER_ISA_SOURCE = "tiles.cpp"
DEFAULT_CUDA_HOME = "/usr/local/cuda"
# Keeps what a compiler says beside its object file, and prints it without the kernels' resources.
LOGGED = '"$@" > "$0" 2>&1; status=$?; grep -Ev "^ptxas info|bytes stack frame" "$0"; exit $status'
BYTES_PER_JOB = 2 * 2**30


class BuildError(Exception):
    """The build cannot be done as asked; the message is for the user."""


class LeftOut(Exception):  # noqa: N818, not an error but a reason
    """A part cannot be built here; the message is the reason."""


def isas(machine: str) -> dict[str, list[str]]:
    """Instruction sets that the CPU tiles are compiled for, each with its compiler flags."""
    if machine.lower() not in ("x86_64", "amd64"):
        return {"baseline": []}
    return {"baseline": [], "avx2": AVX2, "avx512": AVX512}


def default_archs(nvcc_version: tuple[int, int]) -> str:
    """Architectures compiled for unless told otherwise; the newest one also as PTX."""
    return "80;90;100+ptx" if nvcc_version >= (12, 8) else "80;90+ptx"


def gencode(archs: str) -> list[str]:
    """The nvcc options for a list such as ``80;90;100+ptx``."""
    options = []
    for arch in archs.lower().split(";"):
        match = re.fullmatch(r"\s*(\d{2,3}[af]?)(\+ptx)?\s*", arch)
        if not match:
            raise BuildError(
                f"SSP_FUSED_CUDA_ARCHS must be a list such as '80;90;100+ptx', but is {archs!r}"
            )
        number, ptx = match.groups()
        for code in [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]:
            options += ["-gencode", f"arch=compute_{number},code={code}"]
    return options


def job_count(env: Mapping[str, str], cores: int, free_bytes: int) -> int:
    """Compilers to run at once: ``MAX_JOBS``, or as many as cores and free memory allow."""
    asked = env.get("MAX_JOBS", "")
    if not asked:
        return max(1, min(cores, free_bytes // BYTES_PER_JOB))
    if not asked.isdigit() or int(asked) == 0:
        raise BuildError(f"MAX_JOBS must be a positive integer, but is {asked!r}")
    return int(asked)


def find_nvcc(env: Mapping[str, str]) -> str:
    """The path of nvcc."""
    homes = [env[name] for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", f"{DEFAULT_CUDA_HOME}/bin/nvcc"]
    for place in places:
        if found := _which(place, env):
            return found
    looked = ", ".join("nvcc on PATH" if place == "nvcc" else place for place in places)
    raise LeftOut(f"no nvcc; looked for {looked}")


def toolkit(nvcc: str) -> Path:
    """The folder of nvcc's toolkit, as it says itself: on PATH there may be but a script that calls it."""
    top = re.search(
        r"^#\$ TOP=(.*)$", _output([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]), re.M
    )
    if top is None:
        raise LeftOut(f"{nvcc} --dryrun does not name its folder")
    return Path(top[1]).resolve()


def find_cxx(env: Mapping[str, str]) -> list[str]:
    """The command of a compiler that compiles and links C++20."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if found := _which(command[0], env):
            command[0] = found
            source = "#include <version>\n#ifndef __cpp_concepts\n#error no C++20\n#endif\n"
            _probe([*command, "-fPIC"], source, ".cpp")
            return command
    raise LeftOut(f"no C++ compiler; looked for {', '.join(names)} on PATH")


def _which(command: str, env: Mapping[str, str]) -> str | None:
    return shutil.which(command, path=env.get("PATH", os.defpath))


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise LeftOut(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["it printed nothing"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise LeftOut(f"{command[0]} failed: {reason.strip()}")
    return done.stdout


def _probe(compiler: Sequence[str], source: str, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"probe{suffix}")
        path.write_text(source)
        _output([*compiler, STANDARD, "-shared", str(path), "-o", f"{folder}/probe.so"])


@dataclass(frozen=True)
class Torch:
    """A torch to compile against: its folder, with ``include`` and ``lib``, and its version."""

    root: Path
    version: str

    @classmethod
    def at(cls, root: Path) -> Torch:
        """The torch in the folder ``root``; too old a one is an error."""
        version = str(runpy.run_path(str(root / "version.py"))["__version__"])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            raise BuildError(f"torch must be 2.11 or newer, but is {version} in {root}")
        return cls(root, version)

    @classmethod
    def installed(cls) -> Torch:
        """The torch of the running interpreter."""
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise BuildError(f"torch is needed to build against, and {sys.executable} has none")
        return cls.at(Path(spec.submodule_search_locations[0]))

    @property
    def include(self) -> list[str]:
        """Compiler options."""
        return ["-isystem", str(self.root / "include")]

    @property
    def libraries(self) -> list[str]:
        """Linker options."""
        return [f"-L{self.root / 'lib'}", "-ltorch_cpu", "-lc10"]


@dataclass(frozen=True)
class Step:
    """One call of a compiler or linker."""

    command: list[str]
    inputs: list[Path]
    output: Path
    is_link: bool


@dataclass
class Plan:
    """What to build into the folder ``target``, how, and what is left out and why."""

    target: Path
    folder: Path
    compiler: str | None = None
    isas: list[str] = field(default_factory=list)
    cuda_archs: str | None = None
    nvcc: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def compile(self, command: Sequence[str], source: Path, tag: str = "") -> Path:
        """Add a compilation; returns the object file."""
        output = self.folder / source.parent.name / f"{source.name}{tag}.o"
        files = ["-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        logged = ["sh", "-c", LOGGED, f"{output}.log"] if source.suffix == ".cu" else []
        self.steps.append(Step([*logged, *command, *files], [source], output, is_link=False))
        return output

    def link(
        self, command: Sequence[str], objects: list[Path], name: str, libraries: Sequence[str]
    ) -> None:
        """Add the linking of the binary ``name``."""
        output = self.target / outputs()[name]
        files = [*map(str, objects), "-o", str(output)]
        self.steps.append(Step([*command, *files, *libraries], objects, output, is_link=True))

    def attempt(self, name: str, part: Callable[..., None], *args: object) -> None:
        """Plan one part, or note why it is left out."""
        try:
            part(self, *args)
        except LeftOut as reason:
            self.left_out[name] = str(reason)


def outputs() -> dict[str, str]:
    """The path of each binary inside the package."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return {"_ops": "_lib/ops.so", "_cuda": "_lib/cuda.so", "_C": f"_C{suffix}"}


def _plan_ops(plan: Plan, cxx: list[str], torch: Torch) -> None:
    sets = isas(platform.machine())
    command = [*cxx, STANDARD, *CPU_FLAGS, *COMMON, *STABLE_ABI, f"-I{CSRC}", *torch.include]
    if len(sets) > 1:
        command.append("-DSSP_X86_ISAS")
    objects = []
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        if source.name != PER_ISA_SOURCE:
            objects.append(plan.compile(command, source))
            continue
        for isa, flags in sets.items():
            objects.append(plan.compile([*command, f"-DSSP_ISA={isa}", *flags], source, f".{isa}"))
    plan.link([*cxx, "-shared", "-Wl,-z,defs"], objects, "_ops", torch.libraries)
    plan.isas = list(sets)


def _plan_cuda(plan: Plan, env: Mapping[str, str], torch: Torch, resolve: bool) -> None:
    if env.get("SSP_FUSED_CUDA") == "0":
        raise LeftOut("SSP_FUSED_CUDA=0")
    nvcc = find_nvcc(env)
    release = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < OLDEST_NVCC:
        raise LeftOut(f"nvcc must be 12.0 or newer, but {nvcc} is {version[0]}.{version[1]}")
    compiler = [nvcc, *(["-ccbin", env["CXX"]] if env.get("CXX") else [])]
    _probe([*compiler, "-Xcompiler", "-fPIC"], "__global__ void probe() {}\n", ".cu")
    archs = env.get("SSP_FUSED_CUDA_ARCHS") or default_archs(version)
    command = [*compiler, STANDARD, "-O3", "-DNDEBUG", "-DUSE_CUDA", *STABLE_ABI]
    command += [f"-I{CSRC}", *torch.include, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    objects = [plan.compile(command, source) for source in sorted(CSRC.glob("cuda/*.cpp"))]
    for source in sorted(CSRC.glob("cuda/*.cu")):
        objects.append(plan.compile([*command, "-Xptxas=-v", *gencode(archs)], source))
    # libtorch.so, which a CPU build of torch has too, brings libtorch_cuda.so along at run time;
    # nothing refers to it by name, so that the linker would drop it.
    libraries = [*torch.libraries, "-Xlinker", "--no-as-needed,-ltorch,--as-needed"]
    if resolve:
        libraries += ["-ltorch_cuda", "-lc10_cuda", "-Xlinker", "-z,defs,--allow-shlib-undefined"]
    plan.link([*compiler, "-shared"], objects, "_cuda", libraries)
    plan.cuda_archs, plan.nvcc = archs, f"{version[0]}.{version[1]}"


def _plan_bindings(plan: Plan, cxx: list[str], torch: Torch) -> None:
    if importlib.util.find_spec("pybind11") is None:
        raise LeftOut(f"pybind11 is not installed for {sys.executable}")
    import pybind11

    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise LeftOut(f"Python's headers are not installed: no Python.h in {python}")
    config = {
        "SSP_BUILD_TORCH": torch.version,
        "SSP_BUILD_ISAS": ",".join(plan.isas),
        "SSP_BUILD_NVCC": plan.nvcc or "",
        "SSP_BUILD_CUDA_ARCHS": plan.cuda_archs or "",
    }
    defines = "".join(f"#define {name} {json.dumps(value)}\n" for name, value in config.items())
    _write_if_changed(plan.folder / "build_config.h", f"#pragma once\n\n{defines}")
    command = [*cxx, STANDARD, "-O2", "-ffp-contract=off", *COMMON, f"-I{plan.folder}"]
    command += [f"-I{CSRC}", "-isystem", pybind11.get_include(), "-isystem", str(python)]
    plan.link([*cxx, "-shared"], [plan.compile(command, CSRC / "bindings.cpp")], "_C", [])


def object_folder(torch: Torch) -> Path:
    """Where a build against ``torch`` keeps its object files and the compilers' messages."""
    return ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch-{torch.version}"


def make_plan(target: Path, env: Mapping[str, str], torch_root: Path | None = None) -> Plan:
    """Decide what to build into ``target``, and how.

    A part that cannot be built here is left out with its reason; ``SSP_FUSED_CUDA=1`` makes the
    lack of the CUDA library a :class:`BuildError`. With ``torch_root`` only the op libraries are
    built, against the torch in that folder, and every symbol of theirs must be found there.
    """
    wish = env.get("SSP_FUSED_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"SSP_FUSED_CUDA must be 0, 1 or unset, but is {wish!r}")
    plan = Plan(target, target)
    try:
        if sys.platform != "linux":
            raise LeftOut(f"the binaries are built on Linux only, and this is {sys.platform}")
        cxx = find_cxx(env)
    except LeftOut as reason:
        plan.left_out = dict.fromkeys(outputs(), str(reason))
    else:
        torch = Torch.at(torch_root) if torch_root else Torch.installed()
        if not torch_root:
            plan.folder = object_folder(torch)
        plan.compiler = _output([*cxx, "--version"]).splitlines()[0]
        plan.attempt("_ops", _plan_ops, cxx, torch)
        plan.attempt("_cuda", _plan_cuda, env, torch, torch_root is not None)
        if not torch_root:
            plan.attempt("_C", _plan_bindings, cxx, torch)
    if wish == "1" and "_cuda" in plan.left_out:
        reason = plan.left_out["_cuda"]
        raise BuildError(f"SSP_FUSED_CUDA=1, but the CUDA library cannot be built: {reason}")
    return plan


def _write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja_file(steps: Sequence[Step]) -> str:
    def escape(text: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    lines = ["rule compile", "  command = $call", "  depfile = $out.d", "  deps = gcc"]
    lines += ["  description = compile $out", "rule link", "  command = $call"]
    lines += ["  description = link $out"]
    for step in steps:
        rule = "link" if step.is_link else "compile"
        inputs = " ".join(map(escape, step.inputs))
        lines.append(f"build {escape(step.output)}: {rule} {inputs}")
        lines.append(f"  call = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def run(plan: Plan, env: Mapping[str, str]) -> None:
    """Carry out a plan: by ninja, which redoes only what changed, or else by itself."""
    free = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    free_bytes = int(free[1]) * 1024 if free else BYTES_PER_JOB
    jobs = job_count(env, len(os.sched_getaffinity(0)), free_bytes)
    for step in plan.steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    beside_python = str(Path(sys.executable).parent)
    ninja = shutil.which("ninja", path=os.pathsep.join([beside_python, env.get("PATH", "")]))
    if ninja:
        _write_if_changed(plan.folder / "build.ninja", _ninja_file(plan.steps))
        if subprocess.run([ninja, "-C", str(plan.folder), "-j", str(jobs)]).returncode:
            raise BuildError("the compilation failed; its messages are above")
        return
    with ThreadPoolExecutor(jobs) as pool:
        for is_link in (False, True):
            steps = [step for step in plan.steps if step.is_link == is_link]
            for done in pool.map(lambda step: subprocess.run(step.command), steps):
                if done.returncode:
                    raise BuildError(f"{shlex.join(done.args)} failed; its messages are above")


def build(target: Path, env: Mapping[str, str] = os.environ) -> list[Path]:
    """Build what can be built into the package folder ``target``; returns the files written.

    What is left out is printed, recorded in ``_build_info.json``, and removed where an earlier
    build had left it.
    """
    plan = make_plan(target, env)
    for name, reason in plan.left_out.items():
        print(f"ssp_fused: left out {name}: {reason}", flush=True)
        (target / outputs()[name]).unlink(missing_ok=True)
    if plan.steps:
        run(plan, env)
    built = plan.nvcc is not None
    info = {
        "version": runpy.run_path(str(PACKAGE / "_version.py"))["__version__"],
        "torch": Torch.installed().version if plan.steps else None,
        "compiler": plan.compiler,
        "isas": plan.isas,
        "cuda": {"built": built, "archs": plan.cuda_archs, "nvcc": plan.nvcc},
        "left_out": plan.left_out,
    }
    _write_if_changed(target / "_build_info.json", json.dumps(info, indent=2) + "\n")
    return [step.output for step in plan.steps if step.is_link] + [target / "_build_info.json"]


def main() -> int:
    """Build in place, or against another torch where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--resolve-against",
        type=Path,
        metavar="TORCH",
        help="only compile the op libraries, into its parent folder, against the torch unpacked "
        "in this folder, and resolve their symbols against its libraries",
    )
    args = parser.parse_args()
    try:
        if args.resolve_against is None:
            build(PACKAGE)
        else:
            root = args.resolve_against.resolve()
            plan = make_plan(root.parent / "build", os.environ, root)
            for name, reason in plan.left_out.items():
                print(f"ssp_fused: left out {name}: {reason}", flush=True)
            run(plan, os.environ)
    except BuildError as error:
        print(f"ssp_fused: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
