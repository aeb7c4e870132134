"""`python -m benchmarks.triton_every`: what is compiled, what is not compiled again, and what it says."""

import csv
import dataclasses

import pytest

from benchmarks import triton_bounds, triton_every, triton_resources

pytest.importorskip("triton")


@pytest.fixture
def few(monkeypatch):
    """The launches of two kernels, two each."""
    every = triton_resources.launches()
    chosen = [
        launch
        for name in ("combine_kernel", "update_kernel")
        for launch in [launch for launch in every if launch.name == name][:2]
    ]
    monkeypatch.setattr(triton_resources, "launches", lambda: chosen)
    return chosen


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def call(folder, *options):
    out, summary = folder / "every.csv", folder / "summary.csv"
    code = triton_every.main(
        ["--out", str(out), "--summary", str(summary), "--archs", "80", "--jobs", "1", *options]
    )
    return code, read(out), read(summary)


def test_each_launch_is_compiled_once(few, tmp_path, capsys, monkeypatch):
    code, rows, summary = call(tmp_path)
    assert code == 0
    assert {(row["kernel"], row["variant"]) for row in rows} == {(f.name, f.variant) for f in few}
    assert [(row["kernel"], row["arch"], row["launches"]) for row in summary] == [
        ("combine_kernel", "sm_80", "2"),
        ("update_kernel", "sm_80", "2"),
    ]
    for row in summary:
        own = [r for r in rows if r["kernel"] == row["kernel"]]
        assert int(row["most_registers"]) == max(int(r["registers"]) for r in own) > 0
        assert row["broken"] == row["most_spill_bytes"] == "0"
    assert "0 kernels are compiled already, 4 are to be" in capsys.readouterr().out

    def none(*_):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patched:
        patched.setattr(triton_every, "_compiled", none)
        assert call(tmp_path) == (code, rows, summary)

    # Half of it is there: the other half is compiled.
    triton_every.write(tmp_path / "every.csv", triton_every.COLUMNS, rows[:2])
    assert call(tmp_path)[0] == 0
    assert "2 kernels are compiled already, 2 are to be" in capsys.readouterr().out
    # Other kernels than those that were compiled: all are.
    monkeypatch.setattr(triton_every, "sources", lambda *_: "others")
    _, again, _ = call(tmp_path)
    assert len(again) == 4 and {row["sources"] for row in again} == {"others"}


def test_kernels_options_bounds_and_versions_are_told_apart(few):
    combine, update = few[0], few[2]
    now = ("bounds", "3.7.1")
    digests = {triton_every.sources(launch, now) for launch in few}
    assert len(digests) == 2  # two launches of a kernel differ in their arguments alone
    others = [
        (dataclasses.replace(combine, warps=16), now),
        (dataclasses.replace(combine, registers=64), now),
        (dataclasses.replace(combine, kernel=update.kernel), now),
        (combine, ("other bounds", "3.7.1")),
        (combine, ("bounds", "3.7.2")),
    ]
    assert not digests & {triton_every.sources(*other) for other in others}


def test_a_kernel_out_of_bounds_is_an_error(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton_bounds, "REGISTERS", 0)
    code, rows, summary = call(tmp_path)
    assert code == 2
    assert {row["broken"] for row in rows} == {"more registers than there are"}
    assert [row["broken"] for row in summary] == ["2", "2"]
    assert "2 out of bounds" in capsys.readouterr().out
