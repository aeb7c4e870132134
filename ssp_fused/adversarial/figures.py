"""Figures of what was measured: lines in panels side by side, one color for each run."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import BEST, LAST
from .files import replace_file
from .growth import ORDERS
from .run import METRICS

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
# Grey, and Okabe and Ito's colors: told apart with any color vision.
COLORS = ("#6b6b6b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Points of a longer line are too close to each other to be marked.
_MARKED_POINTS = 30


@dataclass(frozen=True)
class Panel:
    """Lines over a common axis.

    Attributes:
        title, x_label, y_label: what is shown.
        lines: by label, points (x, y); x are numbers, or the names of categories.
        top: where the y axis ends, which begins at 0; None: above what is largest.
        level: where a dashed line runs across, if anywhere.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float | str, float]]]
    top: float | None = None
    level: float | None = None


def check_figure(path: Path) -> None:
    """Find out that a figure cannot be drawn before its data is computed.

    Raises:
        ValueError: a suffix that stands for no format of figures.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"figure must end in {', '.join(FIGURE_SUFFIXES)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figure needs matplotlib: pip install 'ssp_fused[plot]'") from error


@contextmanager
def drawn(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Empty panels to draw in, `[rows, columns]` of matplotlib's Axes; written to `path` at the end.

    Args:
        path: the figure; its suffix is its format. Replaced whole or not at all.
        rows: of panels.
        columns: of panels.
        size: width and height in inches.

    Raises:
        ValueError, ImportError: as `check_figure`.
    """
    check_figure(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    yield panels
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    suffix = path.suffix.removeprefix(".")
    replace_file(path, lambda file: figure.savefig(file, format=suffix, dpi=150))


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side; lines of the same label have the same color in all of them.

    Args:
        path: as in `drawn`.
        panels: one or more; the first one has all labels.

    Raises:
        ValueError, ImportError: as `check_figure`.
    """
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(panels[0].lines)}
    with drawn(path, 1, len(panels), (4.5 * len(panels), 3.6)) as axes:
        for place, panel in zip(axes[0], panels, strict=True):
            _draw(place, panel, colors)
        axes[0, 0].legend(frameon=False)


def _draw(axes: Any, panel: Panel, colors: Mapping[str, str]) -> None:
    for label, points in panel.lines.items():
        marker = "o" if len(points) <= _MARKED_POINTS else None
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=label, color=colors[label], marker=marker, markersize=4)
    if all(isinstance(x, int) for points in panel.lines.values() for x, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1] if panel.top is None else panel.top)


def growth_panels(reports: Sequence[dict[str, Any]]) -> list[Panel]:
    """Mean growth of each group, p = 1 and p = 2, from reports of `checkpoint_growth`."""
    labels = run_labels(reports)
    return [
        Panel(
            f"Perturbation growth, p = {p}",
            "group",
            "out / in",
            {
                label: [(name, values[key]) for name, values in report["growth"].items()]
                for label, report in zip(labels, reports, strict=True)
            },
            level=1,
        )
        for key, p in ORDERS.items()
    ]


def curve_panels(reports: Sequence[dict[str, Any]]) -> list[Panel]:
    """Test accuracy over the attack's radius, from reports of `checkpoint_curve`."""
    labels = run_labels(reports)
    lines = {
        label: [(point["eps"], 100 * point["accuracy"]) for point in report["points"]]
        for label, report in zip(labels, reports, strict=True)
    }
    first = reports[0]
    radius = f"eps ({first['norm']}, pixels in [0, 1])"
    title = f"Test accuracy under {first['attack']}"
    return [Panel(title, radius, "accuracy (%)", lines, top=100)]


def history_panels(reports: Sequence[dict[str, Any]]) -> list[Panel]:
    """Training loss and validation accuracies over epochs, from reports of `run_history`."""
    labels = run_labels(reports)

    def panel(title: str, y_label: str, key: str, scale: int, top: float | None) -> Panel:
        lines = {
            label: [(epoch["epoch"], scale * epoch[key]) for epoch in report["epochs"]]
            for label, report in zip(labels, reports, strict=True)
            if key in report["epochs"][0]
        }
        return Panel(title, "epoch", y_label, lines, top=top)

    panels = [
        panel("Training", "loss", "train_loss", 1, None),
        panel("Validation, clean", "accuracy (%)", "val_clean", 100, 100),
        panel("Validation, attacked", "accuracy (%)", "val_robust", 100, 100),
    ]
    return [panel for panel in panels if panel.lines]


def run_labels(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Short names of the reports' runs or checkpoints, or whole paths where short ones clash."""
    paths = [
        report["metrics"] if "metrics" in report else report["checkpoint"] for report in reports
    ]
    of_runs = (BEST, LAST, METRICS)
    names = (Path(os.path.abspath(path)) for path in paths)
    short = [name.parent.name if name.name in of_runs else name.stem for name in names]
    return short if len(set(short)) == len(short) else paths
