"""The command behind the documents' demo."""

import json
from pathlib import Path

from benchmarks import demo


def test_results_are_written_with_the_machine(tmp_path, monkeypatch):
    def run(arguments):
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "demo.json").write_text(json.dumps({"images": 450}))
        (folder / "demo.png").write_bytes(b"figure")

    monkeypatch.setattr(demo.demo, "main", run)
    assert demo.main(["--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["images"] == 450 and found["machine"]["torch"]
    assert (tmp_path / "demo.png").read_bytes() == b"figure"
