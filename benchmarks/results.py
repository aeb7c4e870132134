"""Rows of measurements: as CSV files, as a table, and two files compared.

One row is one contender in one direction of one case of one benchmark, with the machine it was measured on.
"""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .hardware import Machine

OK, WRONG, CANNOT_RUN = "ok", "wrong", "cannot run"
EAGER, CONTROL, CONVOLUTIONS = "eager", "eager (control)", "convolutions"
COPY = "copy"  # on the device, of as many bytes


@dataclass(frozen=True)
class Row:
    """One measurement; what was not measured is None.

    Attributes:
        status: "ok", "wrong: the tensor and its error" or "cannot run: the reason".
        checked: How the results were compared with the fp64 reference; empty where they compute something else.
        p20_ms, median_ms, p80_ms: Quantiles of the time of one call.
        over_convolutions, over_eager: Ratio of the medians.
        bytes: Logical bytes of the op or chain (``traffic``), the same for every contender.
        gb_per_s: ``bytes`` by the median time, 1e9 bytes a GB.
        kept_bytes, kept_parameter_bytes, kept_input_bytes: Kept for backward (``memory``).
        peak_bytes: Most memory a call allocated beyond what was there before.
    """

    benchmark: str
    case: str
    contender: str
    direction: str
    device: str
    status: str
    checked: str = ""
    repeats: int | None = None
    p20_ms: float | None = None
    median_ms: float | None = None
    p80_ms: float | None = None
    over_convolutions: float | None = None
    over_eager: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    kept_bytes: int | None = None
    kept_parameter_bytes: int | None = None
    kept_input_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What it shares with the rows it may be compared with."""
        return self.benchmark, self.case, self.direction, self.device

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What the row is about."""
        return *self.group, self.contender


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one group, with the ratios of their medians to the convolutions' and to eager's."""
    medians = {row.contender: row.median_ms for row in rows}

    def over(row: Row, base: str) -> float | None:
        known = medians.get(base)
        return row.median_ms / known if row.median_ms is not None and known else None

    return [
        dataclasses.replace(
            row, over_convolutions=over(row, CONVOLUTIONS), over_eager=over(row, EAGER)
        )
        for row in rows
    ]


def write(path: Path, rows: Iterable[Row], machine: Machine) -> None:
    """Write rows that were measured on one machine; numbers keep 6 digits."""
    names = [f.name for f in (*dataclasses.fields(Row), *dataclasses.fields(Machine))]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row) | dataclasses.asdict(machine)
            writer.writerow({name: _text(value) for name, value in values.items()})
    unfinished.replace(path)


def read(path: Path) -> list[tuple[Row, Machine]]:
    """The rows of a file, each with its machine.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its columns are not those of :class:`Row` and :class:`Machine`.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = [f.name for f in (*dataclasses.fields(Row), *dataclasses.fields(Machine))]
        if reader.fieldnames != wanted:
            raise ValueError(f"{path}: must have the columns {wanted}, got {reader.fieldnames}")
        return [(_parsed(Row, values), _parsed(Machine, values)) for values in reader]


def _text(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(kind: type, values: dict[str, str]) -> typing.Any:
    types = typing.get_type_hints(kind)
    return kind(**{f.name: _value(values[f.name], types[f.name]) for f in dataclasses.fields(kind)})


def _value(text: str, kind: object) -> str | int | float | None:
    if kind is str:
        return text
    if not text:
        return None
    return int(text) if int in typing.get_args(kind) else float(text)


def table(rows: Sequence[Row]) -> str:
    """The rows of one group as lines of text."""
    lines = [f"{rows[0].benchmark}: {rows[0].case}, {rows[0].direction}, {rows[0].device}"]
    head = ("", "median ms", "p20", "p80", "/conv.", "/eager", "GB/s", "/copy", "kept MB")
    widths = (24, 10, 10, 10, 8, 8, 8, 8, 9)
    copied = next((row.gb_per_s for row in rows if row.contender == COPY), None)
    lines.append("".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)))
    for row in rows:
        if row.status != OK:
            lines.append(f"{row.contender:>24}  {row.status}")
            continue
        kept = None if row.kept_bytes is None else row.kept_bytes / 1e6
        times = (row.median_ms, row.p20_ms, row.p80_ms)
        share = row.gb_per_s / copied if row.gb_per_s and copied else None
        cells = (*times, row.over_convolutions, row.over_eager, row.gb_per_s, share, kept)
        texts = (row.contender, *("-" if c is None else f"{c:.3f}" for c in cells))
        lines.append("".join(f"{t:>{w}}" for t, w in zip(texts, widths, strict=True)))
    return "\n".join(lines)


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """A line per row of either: new median / old median, flagged where it is beyond the control's spread.

    The spread of a group is the largest factor by which times of one and the same contender were seen to differ: the
    two entries of eager, the control's quantiles, in either file, and the control from file to file.
    """
    before, after = ({row.key: row for row in rows} for rows in (old, new))
    lines = []
    for key in dict.fromkeys((*before, *after)):
        name = " | ".join(key)
        if key not in before or key not in after:
            lines.append(f"{name}: only in the {'old' if key in before else 'new'} file")
            continue
        a, b = before[key], after[key]
        if a.median_ms is None or b.median_ms is None:
            lines.append(f"{name}: {a.status} -> {b.status}")
            continue
        ratio = b.median_ms / a.median_ms
        spread = _spread(before, after, a)
        lines.append(f"{name}: {ratio:.3f}{_flag(ratio, spread)}")
    return lines


def _flag(ratio: float, spread: float | None) -> str:
    if spread is None:
        return "  (no control: noise unknown)"
    within = 1 / spread <= ratio <= spread
    verdict = "within" if within else "SLOWER, beyond" if ratio > 1 else "FASTER, beyond"
    return f"  {verdict} the control's spread of {spread:.3f}"


def _spread(before: dict[tuple, Row], after: dict[tuple, Row], row: Row) -> float | None:
    """At least 1; None where either file lacks the control."""
    factors = []
    medians = []
    for rows in (before, after):
        own = {r.contender: r for r in rows.values() if r.group == row.group and r.status == OK}
        control = own.get(CONTROL)
        if control is None:
            return None
        medians.append(control.median_ms)
        factors += [control.p80_ms / control.median_ms, control.median_ms / control.p20_ms]
        if EAGER in own:
            factors.append(control.median_ms / own[EAGER].median_ms)
    factors.append(medians[1] / medians[0])
    return max(max(factor, 1 / factor) for factor in factors)
