"""Figures: which data goes where, one color a run, whole files or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssp_fused.adversarial.figures import (
    COLORS,
    Panel,
    curve_panels,
    draw_panels,
    drawn,
    growth_panels,
    history_panels,
    run_labels,
)

LINES = {"a": [(0, 0.5), (1, 0.25)], "b": [(0, 1.0), (1, 0.75)]}


def test_growth_is_drawn_by_group_for_each_norm() -> None:
    growth = {"block1": {"l1": 1.5, "l2": 2.5}, "block2": {"l1": 0.5, "l2": 0.25}}
    reports = [
        {"checkpoint": "runs/res/best.pt", "growth": growth},
        {"checkpoint": "runs/ssp3/best.pt", "growth": {"block1": {"l1": 3.0, "l2": 4.0}}},
    ]
    one, two = growth_panels(reports)
    assert (one.title, two.title) == ("Perturbation growth, p = 1", "Perturbation growth, p = 2")
    assert one.lines == {"res": [("block1", 1.5), ("block2", 0.5)], "ssp3": [("block1", 3.0)]}
    assert two.lines == {"res": [("block1", 2.5), ("block2", 0.25)], "ssp3": [("block1", 4.0)]}
    assert one.level == two.level == 1


def test_accuracy_is_drawn_over_the_radius() -> None:
    points = [{"eps": 0.0, "accuracy": 0.9}, {"eps": 0.1, "accuracy": 0.25}]
    report = {"checkpoint": "a.pt", "attack": "pgd-20", "norm": "l2", "points": points}
    (panel,) = curve_panels([report])
    assert panel.lines == {"a": [(0.0, 90.0), (0.1, 25.0)]}
    assert "pgd-20" in panel.title and "l2" in panel.x_label and panel.top == 100


def history(name: str, **more: float) -> dict[str, Any]:
    epochs = [
        {"epoch": n, "train_loss": 2.0 / n, "val_clean": 0.25 * n, **more} for n in range(1, 4)
    ]
    return {"metrics": f"runs/{name}/metrics.jsonl", "epochs": epochs}


def test_histories_are_drawn_over_epochs() -> None:
    clean, robust = history("clean"), history("robust", val_robust=0.5)
    panels = history_panels([clean, robust])
    assert [panel.y_label for panel in panels] == ["loss", "accuracy (%)", "accuracy (%)"]
    assert panels[0].lines["clean"] == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    assert panels[1].lines["robust"] == [(1, 25.0), (2, 50.0), (3, 75.0)]
    assert panels[2].lines == {"robust": [(1, 50.0), (2, 50.0), (3, 50.0)]}
    assert len(history_panels([clean])) == 2


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/best.pt", "b/last.pt", "c.5.pt"], ["a", "b", "c.5"]),
        (["1/a/best.pt", "2/a/best.pt"], ["1/a/best.pt", "2/a/best.pt"]),
        (["../x/../y.1/best.pt"], ["y.1"]),
    ],
)
def test_labels_are_short_where_they_can_be(
    paths: list[str], labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_labels([{"checkpoint": path} for path in paths]) == labels
    monkeypatch.chdir(tmp_path)
    assert run_labels([{"metrics": "metrics.jsonl"}]) == [tmp_path.name]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    save: Callable[..., None] = figure.savefig
    figures = []

    def savefig(self: Any, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return figures


def drawn_lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axes.lines}


def test_panels_hold_their_lines(tmp_path: Path, seen: list[Any]) -> None:
    categories = {"b": [("x", 2.0), ("y", 3.0)], "a": [("y", 1.0)]}
    panels = [
        Panel("First", "epoch", "loss", LINES),
        Panel("Second", "group", "share", categories, top=50, level=7),
    ]
    draw_panels(tmp_path / "figure.png", panels)
    left, right = seen[0].axes
    assert drawn_lines(left) == LINES
    assert drawn_lines(right)["b"] == [(0, 2.0), (1, 3.0)]
    assert drawn_lines(right)["a"] == [(1, 1.0)]
    assert right.lines[-1].get_ydata() == [7, 7]
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == ("First", "epoch", "loss")
    assert [text.get_text() for text in right.get_xticklabels()] == ["x", "y"]
    assert right.get_ylim() == (0, 50) and left.get_ylim()[0] == 0 and left.get_ylim()[1] > 1
    colors = {
        line.get_label(): line.get_color() for axes in (left, right) for line in axes.lines[:2]
    }
    assert colors == {"a": COLORS[0], "b": COLORS[1]} and len(set(COLORS)) == len(COLORS)
    assert [line.get_color() for line in right.lines[:2]] == [COLORS[1], COLORS[0]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<")]
)
@pytest.mark.usefixtures("seen")
def test_figures_are_written_whole_or_not_at_all(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"figure.{suffix}"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), drawn(path, 1, 2, (4, 3)):
        raise RuntimeError("stop")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    draw_panels(path, [Panel("", "x", "y", LINES)])
    assert path.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [path]
