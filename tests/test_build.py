"""What was built, what was left out and why, and what the build does where something is missing."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ssp_fused import _extension, _ops, _version
from tools import native_build

LIBRARIES = {"ops": "_ops", "cuda": "_cuda"}


def nvcc():
    try:
        return native_build.find_nvcc(os.environ)
    except native_build.LeftOut as reason:
        pytest.skip(str(reason))


@pytest.fixture
def no_cuda_home(monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "DEFAULT_CUDA_HOME", str(tmp_path / "default"))
    cxx = shutil.which("c++") or pytest.skip("no C++ compiler")
    return {"PATH": str(tmp_path), "CXX": cxx}


# What was built


def test_each_binary_is_built_or_left_out_with_a_reason():
    info = _extension.build_info()
    package = Path(_extension.__file__).parent
    for name, path in native_build.outputs().items():
        assert (package / path).is_file() != bool(info["left_out"].get(name)), name


def test_build_info_agrees_with_the_package():
    info = _extension.build_info()
    if info["version"] is None:
        pytest.skip(info["left_out"]["_ops"])
    assert info["version"] == _version.__version__
    assert info["cuda"]["built"] == ("_cuda" not in info["left_out"])
    assert bool(info["isas"]) == ("_ops" not in info["left_out"])


def test_bindings_agree_with_build_info():
    info = _extension.build_info()
    if "_C" in info["left_out"]:
        pytest.skip(info["left_out"]["_C"])
    built = importlib.import_module("ssp_fused._C").build_info()
    assert built["cplusplus"] >= 202002
    assert built["build_type"] == "release"
    assert built["torch"] == info["torch"]
    assert built["isas"] == ",".join(info["isas"])
    assert built["nvcc"] == (info["cuda"]["nvcc"] or "")
    assert built["cuda_archs"] == (info["cuda"]["archs"] or "")


def test_cuda_is_built_wherever_nvcc_is():
    nvcc()
    reason = _extension.build_info()["left_out"].get("_cuda")
    assert reason in (None, "SSP_FUSED_CUDA=0")


def test_cuda_library_registers_its_ops():
    path = _extension._LIBRARIES["cuda"]
    if not path.is_file():
        pytest.skip(_extension.load("cuda"))
    content = path.read_bytes()
    assert b"linf_step" in content
    # Without it the library loads into no torch: see _plan_cuda.
    assert b"libtorch.so\0" in content


@pytest.mark.parametrize("library", LIBRARIES)
def test_op_libraries_are_free_of_python(library):
    path = _extension._LIBRARIES[library]
    if not path.is_file():
        pytest.skip(_extension.load(library))
    assert b"PyObject" not in path.read_bytes()


@pytest.mark.parametrize("library", LIBRARIES)
def test_op_libraries_put_no_number_into_a_stream(library):
    if not _extension._LIBRARIES[library].is_file():
        pytest.skip(_extension.load(library))
    # Not the library itself: where the C++ library is linked in, it has all of that, called by nobody.
    folder = native_build.object_folder(native_build.Torch.installed())
    part = "cpu" if library == "ops" else library
    sources = native_build.CSRC.glob(f"{part}/*.c*")
    objects = [path for s in sources for path in folder.glob(f"{part}/{s.name}*.o")]
    if not objects:
        pytest.skip("no object files here")
    # ostream::operator<< and what it calls: see pytorch.h.
    for path in objects:
        assert not re.findall(rb"_ZNSo(?:ls[Ea-z]\w*|9_M_insert\w*)", path.read_bytes()), path


def test_tiles_share_no_code_across_instruction_sets():
    folder = native_build.object_folder(native_build.Torch.installed())
    objects = sorted(folder.glob("cpu/tiles.cpp.avx*.o"))
    nm = shutil.which("nm")
    if not objects or not nm:
        pytest.skip("no object files here" if nm else "no nm")
    for path in objects:
        listed = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True).stdout
        # The linker keeps one of several weak definitions, for every processor.
        weak = [line for line in listed.splitlines() if " W " in line or " V " in line]
        assert not weak, weak


# Loading


def test_cpu_library_loads_and_registers():
    reason = _extension.load("ops")
    if "_ops" in _extension.build_info()["left_out"]:
        assert _extension.build_info()["left_out"]["_ops"] in reason
        return
    assert reason is None
    for name in _ops.SCHEMAS | _ops.OUT_SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ssp_fused::{name}", "CPU"), name


def test_cuda_library_needs_a_cuda_torch():
    reason = _extension.load("cuda")
    if torch.version.cuda is not None and "_cuda" not in _extension.build_info()["left_out"]:
        assert reason is None
        assert torch._C._dispatch_has_kernel_for_dispatch_key("ssp_fused::linf_step", "CUDA")
    elif "_cuda" in _extension.build_info()["left_out"]:
        assert _extension.build_info()["left_out"]["_cuda"] in reason
    else:
        assert "needs a CUDA build of torch" in reason
        assert torch.__version__ in reason


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_extension, "_LIBRARIES", {"ops": tmp_path / "ops.so"})
    monkeypatch.setattr(_extension, "_loaded", {})
    return tmp_path


def test_a_tree_never_built_says_so(elsewhere):
    assert "never built" in _extension.load("ops")


def test_the_reason_of_the_build_is_passed_on(elsewhere):
    (elsewhere / "_build_info.json").write_text('{"left_out": {"_ops": "no compiler at all"}}')
    assert "no compiler at all" in _extension.load("ops")


def test_a_library_that_does_not_load_says_why(elsewhere):
    (elsewhere / "ops.so").write_text("not a library")
    reason = _extension.load("ops")
    assert str(elsewhere / "ops.so") in reason
    assert torch.__version__ in reason
    assert _extension.load("ops") is reason


# Deciding what to build


@pytest.mark.parametrize(
    ("version", "archs"),
    [
        ((12, 0), "80;90+ptx"),
        ((12, 6), "80;90+ptx"),
        ((12, 8), "80;90;100+ptx"),
        ((13, 0), "80;90;100+ptx"),
    ],
)
def test_architectures_by_nvcc_version(version, archs):
    assert native_build.default_archs(version) == archs


def test_gencode():
    assert native_build.gencode("80;90a+PTX") == [
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-gencode",
        "arch=compute_90a,code=compute_90a",
    ]
    for archs in ("8.0", "sm_80", "80;", "80,90"):
        with pytest.raises(native_build.BuildError, match=r"SSP_FUSED_CUDA_ARCHS .* '80;90;100"):
            native_build.gencode(archs)


def test_jobs_by_cores_and_memory():
    gib = 2**30
    assert native_build.job_count({}, 8, 64 * gib) == 8
    assert native_build.job_count({}, 8, 6 * gib) == 3
    assert native_build.job_count({}, 8, gib // 2) == 1
    assert native_build.job_count({"MAX_JOBS": "5"}, 2, gib) == 5
    for bad in ("0", "-1", "many"):
        with pytest.raises(native_build.BuildError, match="MAX_JOBS"):
            native_build.job_count({"MAX_JOBS": bad}, 2, gib)


def test_cuda_asked_for_without_nvcc_is_an_error(no_cuda_home, tmp_path):
    env = {**no_cuda_home, "SSP_FUSED_CUDA": "1", "CUDA_HOME": str(tmp_path / "home")}
    with pytest.raises(native_build.BuildError, match="SSP_FUSED_CUDA=1") as raised:
        native_build.make_plan(tmp_path, env)
    for place in (f"{tmp_path}/home/bin/nvcc", "nvcc on PATH", f"{tmp_path}/default/bin/nvcc"):
        assert place in str(raised.value)


def test_no_nvcc_leaves_cuda_out(no_cuda_home, tmp_path):
    plan = native_build.make_plan(tmp_path, no_cuda_home)
    assert "no nvcc" in plan.left_out["_cuda"]
    assert "_ops" not in plan.left_out
    assert not any("cuda" in str(step.output.name) for step in plan.steps)


def test_cuda_can_be_declined(tmp_path):
    plan = native_build.make_plan(tmp_path, {**os.environ, "SSP_FUSED_CUDA": "0"})
    assert plan.left_out["_cuda"] in ("SSP_FUSED_CUDA=0", plan.left_out.get("_ops"))
    with pytest.raises(native_build.BuildError, match="SSP_FUSED_CUDA must be 0, 1 or unset"):
        native_build.make_plan(tmp_path, {**os.environ, "SSP_FUSED_CUDA": "yes"})


def test_unusable_nvcc_leaves_cuda_out(no_cuda_home, tmp_path):
    fake = tmp_path / "nvcc"
    for text, reason in (("release 11.8", "must be 12.0 or newer"), ("nothing", "0.0")):
        fake.write_text(f"#!/bin/sh\necho '{text}'\n")
        fake.chmod(0o755)
        assert reason in native_build.make_plan(tmp_path, no_cuda_home).left_out["_cuda"]


def test_no_compiler_leaves_everything_out(tmp_path):
    env = {"PATH": str(tmp_path)}
    plan = native_build.make_plan(tmp_path, env)
    assert plan.left_out.keys() == native_build.outputs().keys()
    assert all("no C++ compiler" in reason for reason in plan.left_out.values())
    assert not plan.steps
    files = native_build.build(tmp_path, env)
    assert files == [tmp_path / "_build_info.json"]


def test_a_compiler_that_fails_is_quoted(tmp_path):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: no such standard'; exit 1\n")
    fake.chmod(0o755)
    plan = native_build.make_plan(tmp_path, {"PATH": str(tmp_path)})
    assert "fatal error: no such standard" in plan.left_out["_ops"]


def test_no_pybind11_leaves_the_bindings_out(no_cuda_home, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name)
    )
    plan = native_build.make_plan(tmp_path, no_cuda_home)
    assert "pybind11 is not installed" in plan.left_out["_C"]
    assert "_ops" not in plan.left_out


def test_a_torch_too_old_is_an_error(tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.10.1+cu128'\n")
    with pytest.raises(native_build.BuildError, match=r"2\.11 or newer, but is 2\.10\.1\+cu128"):
        native_build.Torch.at(tmp_path)


def test_stale_binaries_are_removed(tmp_path):
    (tmp_path / "_lib").mkdir()
    stale = tmp_path / "_lib" / "cuda.so"
    stale.write_text("from an earlier build")
    native_build.build(tmp_path, {"PATH": str(tmp_path)})
    assert not stale.exists()


def test_what_nvcc_says_is_kept_and_printed_without_the_resources(tmp_path):
    plan = native_build.Plan(tmp_path, tmp_path)
    (tmp_path / tmp_path.name).mkdir()
    says = "echo 'ptxas info : 40 registers'; echo '  0 bytes stack frame'; echo a warning >&2"
    output = plan.compile(["sh", "-c", f"{says}; exit 3"], tmp_path / "kernel.cu")
    done = subprocess.run(plan.steps[0].command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == "a warning\n"
    assert "40 registers" in Path(f"{output}.log").read_text()
