"""Markdown: tables, ranges of numbers, and paragraphs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from benchmarks.results import COPY, OK, Row

_LABELS = {"compile-default": "torch.compile", "fused-cpu": "fused", COPY: "a copy"}
_WIDTH = 120


def label(contender: str) -> str:
    """A contender's name in a table."""
    return _LABELS.get(contender, contender)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows))


def paragraph(text: str) -> str:
    """The text in lines that are not too long; code is not broken."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def span(values: Iterable[float], digits: int = 2) -> str:
    """Smallest and largest: "0.72 to 0.87", or the one number that both are when rounded; a dash for none."""
    values = list(values)
    if not values:
        return "-"
    ends = dict.fromkeys(f"{end:.{digits}f}" for end in (min(values), max(values)))
    return " to ".join(ends)


def groups(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows that may be compared with each other, by contender, in the order of the file."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.group, {})[row.contender] = row
    return list(found.values())


def shortened(cases: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The words that all cases have in common, and each case's others."""
    cases = list(dict.fromkeys(cases))
    common = [word for word in cases[0].split() if all(word in case.split() for case in cases)]
    if len(cases) == 1:
        return "", {cases[0]: cases[0]}
    others = {c: " ".join(w for w in c.split() if w not in common) for c in cases}
    return " ".join(common), others


def contenders(rows: Iterable[Row]) -> list[str]:
    """Those that were measured, in the order of the file."""
    return list(dict.fromkeys(row.contender for row in rows if row.status == OK))


def refusals(rows: Iterable[Row]) -> list[str]:
    """A line for each contender that was measured elsewhere in the file, and not here."""
    rows = list(rows)
    measured = contenders(rows)
    several = len({row.case for row in rows}) > 1
    return [
        f"- {label(row.contender)}, {row.direction}{f', {row.case}' if several else ''}: {row.status}"
        for row in rows
        if row.status != OK and row.contender in measured
    ]


def mebibytes(size: int | None) -> str:
    """2^20 bytes a MiB, in two digits or more; a dash for None."""
    if size is None:
        return "-"
    value = size / 2**20
    return f"{value:.0f} MiB" if value >= 10 else f"{value:.1f} MiB"
