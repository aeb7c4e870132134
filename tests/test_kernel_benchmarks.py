"""The benchmarks of single ops and of kernels' resources: what is refused, what is listed, what is written."""

import csv
import re
from collections import Counter

import pytest
import test_faults
import torch

import ssp_fused
from benchmarks import harness, kernel_resources, kernels, op_cases, results, triton_resources
from benchmarks.cases import CHANNELS_LAST, CONTIGUOUS
from benchmarks.op_cases import SPECS, OpCase
from benchmarks.resources import Resources
from ssp_fused import _ops, reference
from ssp_fused._backends import cpu

CPU = torch.device("cpu")
FEW = harness.Settings(repeats=2, warmup=0)
needs_cpu_kernels = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)


def small_case(spec, layout=CONTIGUOUS, dtype="float32"):
    return OpCase(spec, (3, 4, 5, 6), dtype, layout, CPU)


@needs_cpu_kernels
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("spec", SPECS)
def test_the_fused_ops_are_right(spec, layout):
    task = kernels.task(small_case(spec, layout), ["eager", "fused-cpu", "copy"])
    rows = {row.contender: row for row in harness.measure(task, FEW)}
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert rows["fused-cpu"].checked == "fp64" and rows["copy"].checked == ""
    assert len({row.bytes for row in rows.values()}) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_op_is_refused(spec):
    op = getattr(reference, SPECS[spec].op)

    def wrong(*arguments):
        out = op(*arguments)
        values = out if isinstance(out, tuple) else (out,)
        altered = tuple(v * (1 + 1e-3) if v.is_floating_point() else v for v in values)
        return altered if isinstance(out, tuple) else altered[0]

    case = small_case(spec)
    case.check("right", op)
    with pytest.raises(AssertionError, match="exceeds"):
        case.check("altered", wrong)


def test_every_op_with_results_is_measured():
    assert {spec.op for spec in SPECS.values()} == _ops.SCHEMAS.keys() - {"update_running_stats_"}


def test_contenders_that_cannot_run_say_why():
    case = small_case("stage_combine")
    names = ["fused-triton", "fused-cuda", "compile-default"]
    rows = harness.measure(kernels.task(case, names, compiling=False), FEW)
    assert [row.contender for row in rows] == names
    assert all(row.status.startswith("cannot run: ") and row.median_ms is None for row in rows)


def test_bytes_are_those_of_the_formula():
    elements = 3 * 4 * 5 * 6
    assert small_case("stage_norm_act, mask").bytes == 4 * elements * 5 + elements // 8
    assert small_case("norm_act_backward", dtype="bfloat16").bytes == 2 * elements * 4


def test_operands_stay_away_from_kinks():
    operands = op_cases.Operands(0, small_case("stage_norm_act"))
    identity = (*operands.norm[:4], 0, None, False, False)
    y = reference.stage_norm_act(*operands.stage, *identity)[1]
    assert y.abs().min() > 0.5


@needs_cpu_kernels
def test_the_command_line(tmp_path, capsys):
    where = ["--device", "cpu", "--out", str(tmp_path)]
    code = kernels.main(["--quick", "--ops", "stage_combine", "--layouts", CONTIGUOUS, *where])
    printed = capsys.readouterr().out
    assert code == 0 and "/copy" in printed and "cannot run: torch.compile" in printed
    rows = [row for row, _ in results.read(tmp_path / "kernels.csv")]
    assert [row.contender for row in rows] == list(kernels.NAMES)
    assert {row.direction for row in rows} == {"stage_combine"}


@needs_cpu_kernels
def test_a_wrong_kernel_has_no_time_and_shows_in_the_exit_code(tmp_path, monkeypatch):
    ops = test_faults.Faulty("stage_combine", test_faults.wrong_coefficient)
    faulty = type("FaultyBackend", (type(cpu.BACKEND),), {"ops": ops})
    monkeypatch.setattr(cpu.BACKEND, "__class__", faulty)
    only = [
        "--ops",
        "stage_combine",
        "stage_dots",
        "--layouts",
        CONTIGUOUS,
        "--contenders",
        "fused-cpu",
    ]
    assert kernels.main(["--quick", "--device", "cpu", *only, "--out", str(tmp_path)]) == 2
    wrong, right = (row for row, _ in results.read(tmp_path / "kernels.csv"))
    assert wrong.status.startswith("wrong: fused-cpu u: error") and wrong.median_ms is None
    assert right.status == "ok" and right.median_ms > 0


# --- resources --------------------------------------------------------------------------------------------------


ONE = Resources("triton", "combine_kernel", "ROWS=True", "sm_90", 40, 0, 128, 16)


def test_resources_are_printed_and_written(tmp_path, capsys, monkeypatch):
    def rows(backend):
        if backend == "cuda":
            raise harness.CannotRunError("there is no such library")
        yield ONE

    monkeypatch.setattr(kernel_resources, "rows", rows)
    path = tmp_path / "resources.csv"
    assert kernel_resources.main(["--csv", str(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"sm_90 +triton combine_kernel +40 registers +0 B spilled +128 B", printed)
    assert "cuda: no kernels: there is no such library" in printed
    with path.open() as file:
        assert [row["registers"] for row in csv.DictReader(file)] == ["40"]
    assert kernel_resources.main(["--backends", "cuda"]) == 1


def test_a_provider_that_is_missing_is_said_to_be():
    with pytest.raises(harness.CannotRunError, match="none_resources"):
        list(kernel_resources.rows("none"))


def test_widths_of_accesses_are_read_off_the_program_text():
    text = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b32 { %r5 }, [ %rd2 + 0 ];
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
    @%p2 st.global.v2.b64 [ %rd3 + 0 ], { %rd7, %rd8 };
    st.global.b8 [ %rd3 + 0 ], { %rs1 };
    """
    assert triton_resources._widths(text, "ld") == Counter({16: 1, 4: 1})
    assert triton_resources._widths(text, "st") == Counter({16: 1, 1: 1})
