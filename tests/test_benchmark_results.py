"""Result files: rows and their provenance, written, read and compared."""

import csv
import dataclasses
import subprocess

import pytest
import torch
from benchmark_cases import CPU

from benchmarks import hardware, results


def row(contender, median, *, spread=1.1, **values):
    times = {}
    if median is not None:
        times = {"p20_ms": median / spread, "median_ms": median, "p80_ms": median * spread}
    own = {"benchmark": "b", "case": "c, 1", "direction": "d", "device": "cpu", "status": "ok"}
    return results.Row(contender=contender, **{**own, **times, **values})


def test_csv_round_trip(tmp_path):
    machine = hardware.machine(CPU)
    integers = ("repeats", "bytes", "kept_bytes")
    rows = [
        row(
            "eager",
            2.0,
            repeats=30,
            bytes=10**12,
            gb_per_s=0.125,
            kept_bytes=0,
            checked="own signs",
        ),
        row("x", None, status='wrong: "dx", it says\nso'),
    ]
    path = tmp_path / "new" / "rows.csv"
    results.write(path, rows, machine)
    back = results.read(path)
    assert [own for own, _ in back] == [dataclasses.replace(rows[0], p20_ms=1.81818), rows[1]]
    assert all(isinstance(getattr(back[0][0], name), int) for name in integers)
    assert {where for _, where in back} == {machine}
    with path.open(newline="") as file:
        (first, _) = csv.DictReader(file)
    assert (first["median_ms"], first["kept_bytes"], first["peak_bytes"]) == ("2", "0", "")
    assert first["torch"] == torch.__version__ and first["threads"] and first["date"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns \['benchmark'.*got \['a', 'b'\]"):
        results.read(path)


def test_ratios():
    rows = [row("eager", 2.0), row("convolutions", 1.0), row("x", 3.0), row("y", None)]
    found = {r.contender: (r.over_convolutions, r.over_eager) for r in results.with_ratios(rows)}
    assert found == {"eager": (2, 1), "convolutions": (1, 0.5), "x": (3, 1.5), "y": (None, None)}
    assert results.with_ratios(rows[2:])[0].over_eager is None


def test_comparison_flags_what_is_beyond_the_controls_spread():
    control = "eager (control)"
    old = [row("eager", 1.0), row(control, 1.0), row("a", 1.0), row("b", 1.0), row("c", 1.0)]
    old += [row("gone", 1.0), row("failed", 1.0)]
    new = [row("eager", 1.0), row(control, 1.0), row("a", 1.05), row("b", 1.2), row("c", 0.8)]
    new += [row("failed", None, status="wrong: y"), row("added", 1.0)]

    def verdicts(old, new):
        lines = results.compare(old, new)
        return {
            name: line
            for r in (*old, *new)
            for name, line in ((r.contender, line) for line in lines if f"| {r.contender}:" in line)
        }

    found = verdicts(old, new)
    assert "1.050  within the control's spread of 1.100" in found["a"]
    assert "1.200  SLOWER, beyond" in found["b"] and "0.800  FASTER, beyond" in found["c"]
    assert found["gone"].endswith("only in the old file")
    assert found["added"].endswith("only in the new file")
    assert found["failed"].endswith("ok -> wrong: y")
    # What makes the spread: two entries of one contender, a machine that changes from file to file, the quantiles.
    for slow in ({"eager"}, {control}, {"eager", control}):
        changed = [row(r.contender, 1.3) if r.contender in slow else r for r in new]
        assert "within" in verdicts(old, changed)["b"], slow
    wide = row(control, 1.0, spread=1.3)
    for rows in ((old, new), (new, old)):
        changed = [wide if r.contender == control else r for r in rows[0]]
        assert "within" in verdicts(changed, rows[1])["b"]
        assert "within" in verdicts(rows[1], changed)["b"]
    assert "noise unknown" in verdicts([r for r in old if r.contender != control], new)["b"]


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_says_what_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert hardware.commit() is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert hardware.commit() == head
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.csv").write_text("1\n")
    assert hardware.commit() == head
    (tmp_path / "new.py").write_text("1\n")
    assert hardware.commit() == f"{head}-dirty"
