"""The report's figures: each draws result files as an SVG document, or is None where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.cases import CONTIGUOUS
from benchmarks.figures import Bar, bar_chart, ratio_bars
from benchmarks.results import CONTROL, CONVOLUTIONS, COPY, Row

from .sources import CPU, GPU, Sources
from .tables import label, shortened

Panels = dict[str, dict[str, dict[str, Bar]]]


def speed(sources: Sources, device: str) -> str | None:
    """Time over the bare convolutions', per contender and block, in one layout."""
    source = sources.get("blocks", device)
    if source is None:
        return None
    rows = [r for r in _in_one_layout(source.rows) if r.contender not in (CONTROL, COPY)]
    return _chart(
        "Time over that of the bare convolutions", ratio_bars(rows, CONVOLUTIONS), CONVOLUTIONS
    )


def memory(sources: Sources, device: str) -> str | None:
    """Kept for backward, per contender and block, in one layout."""
    source = sources.get("blocks", device)
    if source is None:
        return None
    panels: Panels = {}
    for row in _in_one_layout(source.rows):
        if row.kept_bytes is not None and row.contender != CONTROL:
            bar = Bar(row.kept_bytes / 2**20)
            panels.setdefault(row.direction, {}).setdefault(row.case, {})[row.contender] = bar
    return _chart("Kept for the backward pass, MiB", panels)


def bandwidth(sources: Sources, device: str) -> str | None:
    """Logical bytes by time of each op, against a copy's."""
    source = sources.get("kernels", device)
    if source is None:
        return None
    panels: Panels = {}
    for row in source.rows:
        if row.gb_per_s is not None and row.contender != CONTROL:
            bar = Bar(*(row.bytes / ms / 1e6 for ms in (row.median_ms, row.p80_ms, row.p20_ms)))
            panels.setdefault(row.case, {}).setdefault(row.direction, {})[row.contender] = bar
    return _chart("Logical bytes by time, GB/s", panels, COPY)


def _in_one_layout(rows: Iterable[Row]) -> list[Row]:
    """The contiguous cases, or the others where there are none."""
    rows = list(rows)
    return [row for row in rows if row.case.endswith(CONTIGUOUS)] or rows


def _chart(title: str, panels: Panels, mark: str | None = None) -> str:
    """With the contenders' names in tables, and what all groups have in common in the title."""
    common, names = shortened(group for panel in panels.values() for group in panel)
    named = {
        panel: {names[g]: {label(n): bar for n, bar in bars.items()} for g, bars in own.items()}
        for panel, own in panels.items()
    }
    full = f"{title} ({common})" if common else title
    return bar_chart(full, named, mark=None if mark is None else label(mark))


Figure = Callable[[Sources], "str | None"]

FIGURES: dict[str, Figure] = {
    f"{name}_{device}": partial(draw, device=device)
    for name, draw in (("blocks_time", speed), ("blocks_memory", memory), ("kernels", bandwidth))
    for device in (CPU, GPU)
}
