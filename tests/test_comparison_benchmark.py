"""The command behind the documents' comparison of networks."""

import json

import pytest

from benchmarks import comparison

NUMBER = {"mean": 0.5, "deviation": 0.01, "values": [0.49, 0.51]}
ROW = {"method": "pgd", "model": "ssp2", "blocks": 3, "seeds": [0, 1]}
TABLE = {
    "caption": ["of the protocol"],
    "rows": [{**ROW, "growth": {"blocks": {"l1": NUMBER, "l2": NUMBER}}}],
}


def test_a_table_is_written_with_its_origin(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    asked = []
    monkeypatch.setattr(
        comparison, "reproduce", lambda what, jobs: asked.append((what, jobs)) or TABLE
    )
    runs, out = tmp_path / "runs", tmp_path / "out"
    for commit in ("c0ffee", "c0ffee", "facade"):
        monkeypatch.setattr(comparison, "commit", lambda commit=commit: commit)
        assert comparison.main(["--jobs", "2", "--runs", str(runs), "--out", str(out)]) == 0
    found = json.loads((out / "fmnist.json").read_text())
    assert found.items() >= TABLE.items()
    assert found["commit"] == "commit c0ffee, facade"
    assert "benchmarks.comparison" in found["command"] and found["hardware"]
    assert (out / "fmnist_growth.png").stat().st_size > 0

    what, jobs = asked[0]
    assert jobs == 2 and what.folder == runs
    assert what.reductions().keys() == {
        *("width", "epochs", "milestones", "limit", "models", "growth_images", "autoattack_images")
    }
