"""The figure of a comparison: perturbation growth of each group, by network and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparison_table import TITLES
from .figures import COLORS, drawn
from .growth import ORDERS
from .methods import METHODS

FIGURE = "growth.png"


def draw_comparison(path: Path, table: dict[str, Any]) -> None:
    """Draw mean growth with its deviation over seeds: a row of panels for each p, one per group.

    Args:
        path: the figure; its suffix is its format. Replaced whole or not at all.
        table: of `comparison_table.summary`, with at least one row.

    Raises:
        ValueError, ImportError: as `check_figure`.
    """
    rows = table["rows"]
    groups = list(rows[0]["growth"])
    networks = list(dict.fromkeys((row["model"], row["blocks"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = (4.5 * max(len(groups), 1.5), 6)
    with drawn(path, len(ORDERS), len(groups), size) as panels:
        for (key, p), line in zip(ORDERS.items(), panels, strict=True):
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
                        color=COLORS[index],
                        marker="o",
                        markersize=5,
                        linestyle="none",
                        capsize=3,
                    )
                axes.set(title=f"Perturbation growth of {group}, p = {p}", ylabel="out / in")
                axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
                axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
                labels = [f"{TITLES[model]}\n{blocks} blocks" for model, blocks in networks]
                places = [i + 0.06 * (len(methods) - 1) for i in range(len(networks))]
                axes.set_xticks(places, labels)
        panels[0, 0].legend(frameon=False)
