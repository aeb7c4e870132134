"""A comparison that is run: its table, its stops, its processes, its folder."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ctrl_c, heeding_ctrl_c, raise_at

import ssp_fused
from ssp_fused import cli
from ssp_fused.adversarial import (
    Comparison,
    TrainingInterrupted,
    comparison_figure,
    evaluate_checkpoint,
    load_checkpoint,
    named,
    reproduce,
    reproduction,
)
from ssp_fused.adversarial.comparison_table import markdown, summary
from ssp_fused.adversarial.locks import file_lock

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

CLASSES = 4
ROOT = str(Path(ssp_fused.__file__).parent.parent)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy 8x8 images around one color per class."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 72), ("test", 8)):
        for label in range(CLASSES):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(40, (8, 8, 3), generator=generator)
                noise[..., label % 3] += 50 * (label + 1)
                pixels = noise.to(torch.uint8).numpy().tobytes()
                Image.frombytes("RGB", (8, 8), pixels).save(folder / f"{index}.png")
    return root


def small(images: Path, out: Path, **changes: Any) -> Comparison:
    settings = {
        **{"models": ("res", "ssp2"), "methods": ("none", "pgd"), "seeds": (3, 5), "blocks": 1},
        **{"width": 4, "steps": 1, "epochs": 3, "limit": 256, "autoattack_images": 0},
        **{"growth_images": 8, "data": f"folder:{images}", "out": str(out), "device": "cpu"},
    }
    return Comparison("cifar10", **{**settings, **changes})


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    comparison = small(images, tmp_path_factory.mktemp("comparison") / "all")
    reproduce(comparison)
    return comparison


def test_rows_are_the_means_of_the_runs(finished: Comparison) -> None:
    table = json.loads((finished.folder / "table.json").read_text())
    assert table["rows"] == summary(finished)["rows"]
    assert table["cells"] == {"complete": 8, "all": 8}
    named = [(row["method"], row["model"]) for row in table["rows"]]
    assert named == [("none", "res"), ("none", "ssp2"), ("pgd", "res"), ("pgd", "ssp2")]
    for row in table["rows"]:
        runs = [finished.folder / f"seed{s}/{row['method']}-{row['model']}-1" for s in (3, 5)]
        assert row["seeds"] == [3, 5]
        model, config, _ = load_checkpoint(runs[0] / "best.pt")
        assert (config.model, config.method, config.seed) == (row["model"], row["method"], 3)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        reports = [evaluate_checkpoint(run, ("pgd-20",), masking_images=0) for run in runs]
        for attack in ("clean", "pgd-20"):
            values = [report["accuracy"][attack] for report in reports]
            assert row[attack]["values"] == values
            assert row[attack]["mean"] == pytest.approx(statistics.fmean(values))
            assert row[attack]["deviation"] == pytest.approx(statistics.stdev(values))
        growth = [json.loads((run / "growth.json").read_text()) for run in runs]
        assert [report["images"] for report in growth] == [8, 8]
        assert list(row["growth"]) == ["block1", "block2", "block3"]
        for group, orders in row["growth"].items():
            for p, found in orders.items():
                assert found["values"] == [report["growth"][group][p] for report in growth]
    assert table["rows"][0]["growth"] != table["rows"][2]["growth"]


def test_markdown_and_csv(finished: Comparison) -> None:
    table = summary(finished)
    table["rows"][0]["clean"] = {"mean": 0.75, "deviation": 0.0123, "values": []}
    table["rows"][1]["clean"] = {"mean": 0.5, "deviation": None, "values": []}
    lines = markdown(table).splitlines()
    assert "| training | network | blocks | parameters | F | seeds | clean | PGD-20 |" in lines
    assert any(line.startswith("| clean training | ResNet | 1 | ") for line in lines)
    assert sum(" | 75.0 ± 1.2 | " in line for line in lines) == 1
    assert sum(" | 50.0 | " in line for line in lines) == 1
    rows = (finished.folder / "table.csv").read_text().splitlines()
    assert rows[0] == "method,model,blocks,parameters,evaluations,quantity,seeds,mean,deviation"
    assert len(rows) == 1 + 4 * (2 + 3 * 2)
    assert any(row.startswith("pgd,ssp2,1,") and ",growth block3 l2,3 5," in row for row in rows)


def test_the_caption_lists_each_departure_from_the_protocol(finished: Comparison) -> None:
    *_, source, departures = summary(finished)["caption"]
    assert "folder:" in source and "not bit-exact" in source
    assert departures == (
        "Departs from the protocol in: data folder: (protocol: cifar10); blocks 1 (protocol: 6); "
        "width 4 (protocol: 16); steps 1 (protocol: 7); epochs 3 (protocol: 200); milestones 1, 2, "
        "3 (protocol: 80, 140, 180); limit 256 (protocol: all); growth images 8 (protocol: all); "
        "autoattack images 0 (protocol: all); models res, ssp2 (protocol: res, midrk2, ssp2, ssp3, "
        "ark); methods none, pgd (protocol: none, pgd, trades)."
    )


# Two batches an epoch, three epochs a run, two runs.
@pytest.mark.parametrize(
    ("batch", "graceful"), [(1, True), (1, False), (4, True), (5, False), (8, True)]
)
def test_stopped_in_training(
    images: Path, tmp_path: Path, finished: Comparison, batch: int, graceful: bool
) -> None:
    comparison = small(images, tmp_path / "cut", seeds=(3,), methods=("pgd",))

    def killed() -> None:
        raise MemoryError

    with heeding_ctrl_c(), pytest.MonkeyPatch.context() as patched:
        raise_at(patched, batch, ctrl_c if graceful else killed)
        with pytest.raises((TrainingInterrupted, MemoryError)) as caught:
            reproduce(comparison)
    if graceful:
        assert "the same command goes on" in str(caught.value)
    begun = [cell for cell in comparison.cells() if (cell.folder / "last.pt").is_file()]
    assert len(begun) == batch // 6 + (graceful or batch % 6 > 2)
    fits = []
    with pytest.MonkeyPatch.context() as patched:
        fit = reproduction.fit
        patched.setattr(reproduction, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
        reproduce(comparison)
    assert len(fits) == 2 - len(begun)
    assert_first_seed_of(finished, comparison)


def assert_first_seed_of(whole: Comparison, found: Comparison) -> None:
    expected = {(row["method"], row["model"]): row for row in summary(whole)["rows"]}
    rows = summary(found)["rows"]
    assert len(rows) == len(found.methods) * len(found.models)
    for row in rows:
        same = expected[row["method"], row["model"]]
        for attack in ("clean", "pgd-20"):
            assert row[attack]["values"] == same[attack]["values"][:1]
        for group, orders in row["growth"].items():
            for p, number in orders.items():
                assert number["values"] == same["growth"][group][p]["values"][:1]


@pytest.mark.parametrize("function", ["evaluate_checkpoint", "checkpoint_growth", "write_tables"])
def test_stopped_in_measuring(
    images: Path,
    tmp_path: Path,
    finished: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    comparison = small(images, tmp_path / "cut", seeds=(3,), methods=("pgd",), models=("ssp2",))
    calls = Counter()

    def stopping(name: str, original: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            if name == function and calls[name] == 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return wrapper

    for name in ("fit", "evaluate_checkpoint", "checkpoint_growth", "write_tables"):
        monkeypatch.setattr(reproduction, name, stopping(name, getattr(reproduction, name)))
    with pytest.raises(KeyboardInterrupt):
        reproduce(comparison)
    reproduce(comparison)
    # What was complete was not done again.
    for name in ("fit", "evaluate_checkpoint", "checkpoint_growth"):
        assert calls[name] == 1 + (name == function)
    assert_first_seed_of(finished, comparison)


def test_what_is_finished_is_left_alone(
    finished: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    for name in ("load", "fit", "resume", "evaluate_checkpoint", "checkpoint_growth"):
        monkeypatch.setattr(reproduction, name, refuse)
    assert reproduce(finished) == summary(finished)


def test_a_run_stopped_before_its_first_save_begins_again(images: Path, tmp_path: Path) -> None:
    comparison = small(images, tmp_path / "cut", seeds=(3,), methods=("none",), models=("res",))
    (cell,) = comparison.cells()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reproduction, "fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce(comparison)
    (cell.folder / "config.json").write_text("{}")
    assert reproduce(comparison)["cells"] == {"complete": 1, "all": 1}


def claim(comparison: Comparison) -> None:
    """Have the folder as at the beginning of its first cell."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reproduction, "_work", lambda *_, **__: None)
        reproduce(comparison)


def test_a_cell_that_is_worked_on_is_skipped(images: Path, tmp_path: Path) -> None:
    comparison = small(images, tmp_path / "cut", seeds=(3,), methods=("none",))
    mine, other = comparison.cells()
    claim(comparison)
    mine.folder.mkdir(parents=True)
    with file_lock(mine.folder / ".lock", wait=False) as held:
        assert held
        table = reproduce(comparison)
        assert table["cells"] == {"complete": 1, "all": 2}
        assert [row["model"] for row in table["rows"]] == [other.network.model]
        assert sorted(path.name for path in mine.folder.iterdir()) == [".lock"]
        assert cli.main(command(replace(comparison, models=("res",)))[3:]) == 0
    assert reproduce(comparison)["cells"] == {"complete": 2, "all": 2}


def command(comparison: Comparison, *more: str) -> list[str]:
    options = {
        **{"table": "cifar10", "data": comparison.data, "models": ",".join(comparison.models)},
        **{"methods": ",".join(comparison.methods), "seeds": ",".join(map(str, comparison.seeds))},
        **{"blocks": 1, "width": 4, "steps": 1, "epochs": 3, "limit": 256, "device": "cpu"},
        **{"autoattack-images": 0, "growth-images": 8, "out": comparison.out},
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ssp_fused.cli", "reproduce", *words, *more]


def started(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_commands_in_one_folder_share_the_cells(
    images: Path, tmp_path: Path, finished: Comparison
) -> None:
    comparison = small(images, tmp_path / "shared", seeds=(3,))
    processes = [started(command(comparison)) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    begun = Counter(
        line for output in outputs for line in output.splitlines() if line.endswith(": training")
    )
    assert len(begun) == 4 and set(begun.values()) == {1}
    table = json.loads((comparison.folder / "table.json").read_text())
    assert table["cells"] == {"complete": 4, "all": 4}
    assert_first_seed_of(finished, comparison)


def test_jobs_killed_and_taken_up_again(images: Path, tmp_path: Path) -> None:
    comparison = small(images, tmp_path / "jobs", methods=("pgd",))
    first = started(command(comparison, "--jobs=2"))
    deadline = time.monotonic() + 120
    while not list(comparison.folder.glob("seed*/*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    # The pipe of its output closes when its workers have ended too.
    first.communicate(timeout=120)
    assert not (comparison.folder / "table.json").exists() or (
        json.loads((comparison.folder / "table.json").read_text())["cells"]["complete"] < 4
    )
    assert reproduce(comparison, jobs=2)["cells"] == {"complete": 4, "all": 4}
    assert (comparison.folder / "table.md").is_file()


def test_the_error_of_a_job_is_raised(images: Path, tmp_path: Path) -> None:
    comparison = small(images, tmp_path / "jobs", seeds=(3,), methods=("none",), models=("res",))
    (cell,) = comparison.cells()
    claim(comparison)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text("{}")
    (cell.folder / "last.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"last\.pt: not a checkpoint"):
        reproduce(comparison, jobs=2)


def test_a_folder_outlives_settings_that_come_later(finished: Comparison) -> None:
    path = finished.folder / "settings.json"
    before = path.read_text()
    saved = json.loads(before)
    del saved["tensorboard"]
    try:
        path.write_text(json.dumps(saved))
        assert reproduce(finished)["cells"]["complete"] == len(list(finished.cells()))
    finally:
        path.write_text(before)


def test_a_folder_of_other_settings_is_refused(finished: Comparison, tmp_path: Path) -> None:
    other = replace(finished, epochs=4, width=5, growth_images=None)
    with pytest.raises(ValueError, match="other settings") as caught:
        reproduce(other)
    told = str(caught.value)
    for difference in ("width 4, not 5", "epochs 3, not 4"):
        assert difference in told
    assert "steps" not in told and str(finished.folder) in told
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        reproduce(replace(finished, out=str(tmp_path)))
    assert not (tmp_path / "settings.json").exists()
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(ValueError, match="not the settings of a comparison"):
        reproduce(replace(finished, out=str(tmp_path)))


def test_reports_are_made_again_on_other_images(images: Path, tmp_path: Path) -> None:
    fewer = small(images, tmp_path / "out", models=("res",), seeds=(3,), methods=("none",))
    more = replace(fewer, growth_images=16)
    (cell,) = fewer.cells()
    reproduce(fewer)
    files = ("evaluation.json", "growth.json")
    before = [(cell.folder / name).stat().st_ino for name in files]
    assert summary(more)["cells"] == {"complete": 0, "all": 1}
    assert reproduce(more)["cells"] == {"complete": 1, "all": 1}
    after = [(cell.folder / name).stat().st_ino for name in files]
    assert after[0] == before[0] and after[1] != before[1]
    assert json.loads((cell.folder / "growth.json").read_text())["images"] == 16
    assert len((cell.folder / "metrics.jsonl").read_text().splitlines()) == more.epochs


def test_a_selection_of_a_folder(finished: Comparison) -> None:
    table = reproduce(replace(finished, models=("ssp2",), seeds=(5,), methods=("pgd",)))
    (row,) = table["rows"]
    assert row["seeds"] == [5] and row["clean"]["deviation"] is None
    reproduce(finished)


def test_autoattack_is_a_report_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluated(path: Path, attacks: tuple[str, ...], settings: Any, **more: Any) -> Any:
        asked.append((attacks, settings.limit))
        report = evaluate_checkpoint(path, ("pgd-3",), settings, **more)
        return {**report, "accuracy": {"clean": 1.0, **dict.fromkeys(attacks, 0.25)}}

    monkeypatch.setattr(reproduction, "named_attack", lambda name, **_: asked.append(name))
    monkeypatch.setattr(reproduction, "evaluate_checkpoint", evaluated)
    comparison = small(*(images, tmp_path / "out"), models=("res",), seeds=(3,), methods=("none",))
    comparison = replace(comparison, autoattack_images=5, test_images=7)
    (row,) = reproduce(comparison)["rows"]
    assert asked == ["pgd-20", "autoattack", "pgd-20", (("pgd-20",), 7), (("autoattack",), 5)]
    assert row["autoattack"] == {"mean": 0.25, "deviation": None, "values": [0.25]}
    assert "| clean | PGD-20 | AutoAttack |" in (comparison.folder / "table.md").read_text()


def test_an_attack_that_is_missing_is_found_out_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("pip install it")

    monkeypatch.setattr(named, "LibraryAttack", missing)
    with pytest.raises(ImportError, match="pip install it"):
        reproduce(small(images, tmp_path / "out", autoattack_images=None))
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(
    finished: Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = command(finished)[3:]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(words) == 0
    assert "no growth.png: figure needs matplotlib" in capsys.readouterr().out


def test_figure(finished: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "growth.svg"
    comparison_figure.draw_comparison(path, summary(finished))
    drawn = path.read_text()
    assert drawn.count('id="axes_') == 6
