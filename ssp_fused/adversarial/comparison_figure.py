"""The figure of a comparison: perturbation growth of each group, by network and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparison_table import TITLES
from .files import replace_file
from .growth import _COLORS, check_figure
from .methods import METHODS

FIGURE = "growth.png"
_ORDERS = {"l1": 1, "l2": 2}


def draw_comparison(path: Path, table: dict[str, Any]) -> None:
    """Draw mean growth with its deviation over seeds: a row of panels for each p, one per group.

    Args:
        path: the figure; its suffix is its format. Replaced whole or not at all.
        table: of `comparison_table.summary`, with at least one row.

    Raises:
        ValueError, ImportError: as `check_figure`.
    """
    check_figure(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = table["rows"]
    groups = list(rows[0]["growth"])
    networks = list(dict.fromkeys((row["model"], row["blocks"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(4.5 * max(len(groups), 1.5), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(_ORDERS), len(groups), squeeze=False, sharex=True)
    for (key, p), line in zip(_ORDERS.items(), panels, strict=True):
        for group, axes in zip(groups, line, strict=True):
            for index, method in enumerate(methods):
                mine = [row for row in rows if row["method"] == method]
                found = [row["growth"][group][key] for row in mine]
                axes.errorbar(
                    # Side by side: bars over the same place would hide each other.
                    [networks.index((r["model"], r["blocks"])) + 0.12 * index for r in mine],
                    [number["mean"] for number in found],
                    yerr=[number["deviation"] or 0 for number in found],
                    label=METHODS[method].title,
                    color=_COLORS[index],
                    marker="o",
                    markersize=5,
                    linestyle="none",
                    capsize=3,
                )
            axes.set(title=f"Perturbation growth of {group}, p = {p}", ylabel="out / in")
            axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            labels = [f"{TITLES[model]}\n{blocks} blocks" for model, blocks in networks]
            axes.set_xticks([i + 0.06 * (len(methods) - 1) for i in range(len(networks))], labels)
    panels[0, 0].legend(frameon=False)
    suffix = path.suffix.removeprefix(".")
    replace_file(path, lambda file: figure.savefig(file, format=suffix, dpi=150))
