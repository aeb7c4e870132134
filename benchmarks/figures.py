"""Figures of result files; need the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import EAGER, Row

# Colours that stay apart for colour-blind readers: P. Tol's "bright" scheme.
_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")


def check_available() -> None:
    """Find out that nothing can be drawn before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'ssp_fused[plot]'") from error


def draw_ratios(path: Path, rows: Sequence[Row], base: str = EAGER) -> None:
    """Draw each contender's median time over that of ``base``: a panel a direction, a group of bars a case.

    Whiskers reach from the 20% to the 80% quantile. Groups without ``base`` are left out.

    Args:
        path: The figure; its suffix names the format.
        rows: Of any benchmark.
        base: The contender whose time is 1.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No group has a time of ``base``.
    """
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bases = {r.group: r.median_ms for r in rows if r.contender == base and r.median_ms}
    timed = [r for r in rows if r.median_ms is not None and r.group in bases]
    if not timed:
        raise ValueError(f"rows must hold a time of {base!r} to draw ratios to it, got none")
    directions, cases, contenders = (
        list(dict.fromkeys(getattr(r, name) for r in timed))
        for name in ("direction", "case", "contender")
    )
    height = 1.2 + 0.16 * len(cases) * (len(contenders) + 1)
    figure = Figure(figsize=(5 * len(directions) + 2, max(height, 3)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    step = 1 / (len(contenders) + 1)
    for axes, direction in zip(panels, directions, strict=True):
        for index, contender in enumerate(contenders):
            own = [r for r in timed if (r.direction, r.contender) == (direction, contender)]
            ratios = [r.median_ms / bases[r.group] for r in own]
            whiskers = [
                [(r.median_ms - r.p20_ms) / bases[r.group] for r in own],
                [(r.p80_ms - r.median_ms) / bases[r.group] for r in own],
            ]
            axes.barh(
                [cases.index(r.case) + index * step for r in own],
                ratios,
                step,
                xerr=whiskers,
                label=contender,
                color=_COLORS[index % len(_COLORS)],
                hatch="//" * (index // len(_COLORS)),
                error_kw={"linewidth": 0.8},
            )
        middle = (len(contenders) - 1) * step / 2
        axes.set_yticks([k + middle for k in range(len(cases))], cases)
        axes.axvline(1, color="0.3", linewidth=0.8, linestyle="--")
        axes.set(title=direction, xlabel=f"time / {base}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
