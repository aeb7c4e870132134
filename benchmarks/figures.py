"""Bar charts as SVG text: the same rows give the same bytes on every machine, and nothing has to be installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .results import EAGER, Row

# Colours that stay apart for colour-blind readers: P. Tol's "bright" scheme.
_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
_BAR, _GAP, _PANEL, _BETWEEN = 12, 10, 300, 50  # pixels, as everything below
_LETTER = 7.2  # width of an average letter of the font
_TOP = 62  # title, legend and the panels' titles
_VALUE = 36  # of the number behind the longest bar
_MOST_TICKS = 6


@dataclass(frozen=True)
class Bar:
    """A value, and the ends of its whisker where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


Group = Mapping[str, Bar]  # by series


def ratio_bars(rows: Sequence[Row], base: str) -> dict[str, dict[str, dict[str, Bar]]]:
    """Each contender's median time over that of ``base`` in its group: by direction, case and contender.

    Whiskers reach from the 20% to the 80% quantile. Groups without ``base`` are left out.

    Raises:
        ValueError: No group has a time of ``base``.
    """
    bases = {r.group: r.median_ms for r in rows if r.contender == base and r.median_ms}
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    for row in rows:
        if row.median_ms is not None and row.group in bases:
            times = (row.median_ms, row.p20_ms, row.p80_ms)
            bar = Bar(*(time / bases[row.group] for time in times))
            panels.setdefault(row.direction, {}).setdefault(row.case, {})[row.contender] = bar
    if not panels:
        raise ValueError(f"rows must hold a time of {base!r} to draw ratios to it, got none")
    return panels


def draw_ratios(path: Path, rows: Sequence[Row], base: str = EAGER) -> None:
    """Write the chart of :func:`ratio_bars` as an SVG file."""
    path.write_text(bar_chart(f"time / {base}", ratio_bars(rows, base), mark=base))


def bar_chart(
    title: str, panels: Mapping[str, Mapping[str, Group]], *, mark: str | None = None
) -> str:
    """Horizontal bars: panels side by side, of groups one below the other, of series.

    Args:
        title: What the values are, with their unit.
        panels: By the panel's title, and by group. A group may lack a series, a panel a group.
        mark: The series that is a line across its group in place of a bar.

    Returns:
        The SVG document.

    Raises:
        ValueError: There is nothing to draw.
    """
    every = [group for panel in panels.values() for group in panel.values()]
    series = list(dict.fromkeys(name for group in every for name in group))
    if not series:
        raise ValueError("panels must hold a bar, got none")
    groups = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colors = {
        name: _COLORS[index % len(_COLORS)]
        for index, name in enumerate(name for name in series if name != mark)
    }
    left = 12 + _LETTER * max(map(len, groups))
    height = _BAR * max(len(colors), 1)
    bottom = _TOP + len(groups) * (height + _GAP)
    width = left + len(panels) * (_PANEL + _BETWEEN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + 36}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11" fill="#222222">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(12, 18, title, "start", 'font-weight="bold"'),
        *_legend(colors, mark),
    ]
    for index, name in enumerate(groups):
        y = _TOP + index * (height + _GAP) + height / 2
        lines.append(_text(left - 8, y + 4, name, "end"))
    ticks = _ticks(max(max(bar.value, bar.high or 0) for group in every for bar in group.values()))
    for index, (name, panel) in enumerate(panels.items()):
        x = left + index * (_PANEL + _BETWEEN)
        lines.append(_text(x, _TOP - 8, name, "start", 'font-weight="bold"'))
        place = _placed(x, ticks[-1])
        lines += _axis(ticks, place, bottom)
        for group, bars in panel.items():
            y = _TOP + groups.index(group) * (height + _GAP)
            lines += _group(bars, colors, mark, place, y, height)
    return "\n".join([*lines, "</svg>\n"])


def _placed(left: float, largest: float) -> Callable[[float], float]:
    """Where a value is in a panel that begins at ``left``."""
    return lambda value: left + value / largest * (_PANEL - _VALUE)


def _ticks(largest: float) -> list[float]:
    """From 0, in steps of 1, 2 or 5 times a power of ten; the last is not below ``largest``."""
    least = (largest or 1) / _MOST_TICKS
    power = 10 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [k * step for k in range(math.ceil((largest or 1) / step) + 1)]


def _axis(ticks: Sequence[float], place: Callable[[float], float], bottom: float) -> Iterator[str]:
    for tick in ticks:
        yield _line(place(tick), _TOP, place(tick), bottom, "#dddddd")
        yield _text(place(tick), bottom + 16, f"{tick:.6g}", "middle")


def _group(
    bars: Group,
    colors: Mapping[str, str],
    mark: str | None,
    place: Callable[[float], float],
    top: float,
    height: float,
) -> Iterator[str]:
    zero = place(0)
    for index, (name, color) in enumerate(colors.items()):
        if name not in bars:
            continue
        bar, y = bars[name], top + index * _BAR
        yield (
            f'<rect x="{zero:.1f}" y="{y + 1:.1f}" width="{place(bar.value) - zero:.1f}" '
            f'height="{_BAR - 2}" fill="{color}"/>'
        )
        end = bar.value
        if bar.low is not None and bar.high is not None:
            middle = y + _BAR / 2
            yield _line(place(bar.low), middle, place(bar.high), middle, "#222222")
            end = max(bar.value, bar.high)
        yield _text(
            place(end) + 4,
            y + _BAR - 2.5,
            f"{bar.value:#.3g}".rstrip("."),
            "start",
            'font-size="9"',
        )
    if mark in bars:
        x = place(bars[mark].value)
        yield _line(x, top - 3, x, top + height + 3, "#222222", 'stroke-width="1.6"')


def _legend(colors: Mapping[str, str], mark: str | None) -> Iterator[str]:
    x = 12.0
    for name, color in colors.items():
        yield f'<rect x="{x:.1f}" y="26" width="10" height="10" fill="{color}"/>'
        yield _text(x + 14, 35, name, "start")
        x += 34 + _LETTER * len(name)
    if mark is not None:
        yield _line(x + 5, 25, x + 5, 37, "#222222", 'stroke-width="1.6"')
        yield _text(x + 14, 35, mark, "start")


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    style = f' text-anchor="{anchor}"{" " if more else ""}{more}'
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}"{" " if more else ""}{more}/>'
