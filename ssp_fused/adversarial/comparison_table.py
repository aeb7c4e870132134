"""The table of a comparison: means and deviations over seeds of what its cells measured."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .checkpoint import BEST, load_checkpoint
from .comparison import TABLES, Cell, Comparison, Network
from .files import write_json, write_text
from .methods import METHODS

# Reports of a cell, by the name of the file: the attack of each.
EVALUATION, AUTOATTACK, GROWTH = "evaluation.json", "autoattack.json", "growth.json"
REPORTS = {EVALUATION: "pgd-20", AUTOATTACK: "autoattack", GROWTH: "pgd-20"}
# What a report was made on, beside what its command writes: the first so many images (None: all).
LIMIT = "limit"
MARKDOWN, JSON, CSV = "table.md", "table.json", "table.csv"
TITLES = {
    "res": "ResNet",
    "midrk2": "mid-RK2",
    "ssp2": "SSP-2",
    "ssp3": "SSP-3",
    "ark": "SSP-adap",
}
_ACCURACIES = {"clean": "clean", REPORTS[EVALUATION]: "PGD-20", REPORTS[AUTOATTACK]: "AutoAttack"}
_ORDERS = {"l1": "p = 1", "l2": "p = 2"}


def wanted_reports(comparison: Comparison) -> list[str]:
    """The reports that make a cell complete."""
    return [name for name in REPORTS if name != AUTOATTACK or comparison.autoattack_images != 0]


def image_limit(comparison: Comparison, report: str) -> int | None:
    """On how many of the first test images a report is made (None: all)."""
    return {
        EVALUATION: comparison.test_images,
        AUTOATTACK: comparison.autoattack_images,
        GROWTH: comparison.growth_images,
    }[report]


def is_made(comparison: Comparison, cell: Cell, report: str) -> bool:
    """Whether a cell has a report, on as many images as wanted."""
    path = cell.folder / report
    if not path.is_file():
        return False
    return json.loads(path.read_text())[LIMIT] == image_limit(comparison, report)


def is_complete(comparison: Comparison, cell: Cell) -> bool:
    """Whether a cell has all its reports."""
    return all(is_made(comparison, cell, report) for report in wanted_reports(comparison))


def write_tables(comparison: Comparison) -> dict[str, Any]:
    """Write the complete cells' table as Markdown, JSON and CSV into the comparison's folder.

    Returns:
        What stands in the JSON.
    """
    table = summary(comparison)
    write_json(comparison.folder / JSON, table)
    write_text(comparison.folder / MARKDOWN, markdown(table))
    write_text(comparison.folder / CSV, _csv(table))
    return table


def summary(comparison: Comparison) -> dict[str, Any]:
    """The table of the complete cells, as JSON types.

    Returns:
        "caption", "settings", "reductions", "cells" (complete, and all), and "rows": each a network
        and a method, with "seeds", and for each number its "values" by seed, their "mean" and
        sample "deviation" (None of one seed): accuracies under the attack's name, and "growth" by
        group and norm. "provenance": what the reports say of device, backend and versions.
    """
    cells = list(comparison.cells())
    complete = [cell for cell in cells if is_complete(comparison, cell)]
    rows = []
    for method in comparison.methods:
        for network in comparison.networks():
            same = [c for c in complete if (c.network, c.method) == (network, method)]
            if same:
                rows.append(_row(comparison, network, method, same))
    found = {
        "table": comparison.table,
        "settings": comparison.settings(),
        "reductions": {
            name: {"value": value, "protocol": protocol}
            for name, (value, protocol) in comparison.reductions().items()
        },
        "cells": {"complete": len(complete), "all": len(cells)},
        "provenance": _provenance(complete),
        "rows": rows,
    }
    return {"caption": _caption(comparison, found), **found}


def _row(
    comparison: Comparison, network: Network, method: str, cells: Sequence[Cell]
) -> dict[str, Any]:
    reports = {
        name: [json.loads((cell.folder / name).read_text()) for cell in cells]
        for name in wanted_reports(comparison)
    }
    model, _, _ = load_checkpoint(cells[0].folder / BEST)
    accuracies = {
        key: statistic(report["accuracy"][key] for report in reports[name])
        for key, name in (
            ("clean", EVALUATION),
            *((REPORTS[name], name) for name in (EVALUATION, AUTOATTACK) if name in reports),
        )
    }
    growth = {
        group: {
            p: statistic(report["growth"][group][p] for report in reports[GROWTH]) for p in _ORDERS
        }
        for group in reports[GROWTH][0]["growth"]
    }
    return {
        "method": method,
        "model": network.model,
        "blocks": network.blocks,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluations": network.evaluations,
        "seeds": [cell.seed for cell in cells],
        **accuracies,
        "growth": growth,
    }


def statistic(values: Iterable[float]) -> dict[str, Any]:
    """The values, their mean and their sample deviation (None of a single one)."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def _provenance(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """What the reports were made with, each value once."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        report = json.loads((cell.folder / EVALUATION).read_text())
        for name in ("device", "backend", "versions"):
            if report[name] not in found.setdefault(name, []):
                found[name].append(report[name])
    return found


def _caption(comparison: Comparison, found: dict[str, Any]) -> list[str]:
    """What the numbers are, where they come from, and each departure from the protocol."""
    settings = found["settings"]
    milestones = ", ".join(map(str, settings["milestones"]))
    complete, cells = found["cells"].values()
    lines = [
        f"{TABLES[comparison.table]}: accuracy in percent, mean ± sample standard deviation over "
        f"seeds ({', '.join(map(str, comparison.seeds))}); {complete} of {cells} runs are complete.",
        f"Networks of {settings['blocks']} blocks per group, first width {settings['width']}, "
        f"{settings['norm']} normalization; F: its evaluations in a forward pass. SGD "
        f"{settings['lr']:.4g}, Nesterov momentum {settings['momentum']:.4g}, weight decay "
        f"{settings['weight_decay']:.4g}, batches of {settings['batch_size']}, "
        f"{settings['epochs']} epochs, a tenth of the rate after {milestones}; training attack "
        f"PGD-{settings['steps']} on the network in training mode, the epoch kept is the best on validation images.",
        f"l-infinity attacks from random starts, eps {settings['eps']:.4g}, PGD step "
        f"{settings['step_size']:.4g}. Clean and PGD-20 on {_images(comparison.test_images)}, "
        f"AutoAttack (standard) on {_images(comparison.autoattack_images)}, growth under PGD-20 on "
        f"{_images(comparison.growth_images)}.",
    ]
    if comparison.data is not None:
        lines.append(
            f"The images are those of {comparison.data}, not the files of "
            f"{TABLES[comparison.table]}: where they were compressed with losses (JPEG), they are "
            "not bit-exact, and neither are the split into training and validation images nor the "
            "numbers comparable to the last digit."
        )
    reduced = [
        f"{name.replace('_', ' ')} {_text(pair['value'])} (protocol: {_text(pair['protocol'])})"
        for name, pair in found["reductions"].items()
    ]
    if reduced:
        lines.append(f"Departs from the protocol in: {'; '.join(reduced)}.")
    return lines


def _images(count: int | None) -> str:
    if count is None:
        return "all test images"
    return f"the first {count:,} test images" if count else "no images"


def _text(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(table: dict[str, Any]) -> str:
    """The caption, the table of accuracies, and that of growth."""
    rows = table["rows"]
    accuracies = {key: title for key, title in _ACCURACIES.items() if any(key in r for r in rows)}
    head = ("training", "network", "blocks", "parameters", "F", "seeds", *accuracies.values())
    lines = [
        (
            *_names(row),
            row["blocks"],
            f"{row['parameters']:,}",
            row["evaluations"],
            len(row["seeds"]),
            *(_plus_minus(row[key], 100, 1) for key in accuracies),
        )
        for row in rows
    ]
    columns = [(group, p) for group in (rows[0]["growth"] if rows else ()) for p in _ORDERS]
    growth_head = (
        *("training", "network", "blocks"),
        *(f"{group}, {_ORDERS[p]}" for group, p in columns),
    )
    growth_lines = [
        (*_names(row), row["blocks"], *(_plus_minus(row["growth"][g][p], 1, 2) for g, p in columns))
        for row in rows
    ]
    return (
        "\n\n".join(
            (
                *table["caption"],
                _markdown_table(head, lines),
                "Growth of the attack's perturbation through each group of blocks:",
                _markdown_table(growth_head, growth_lines),
            )
        )
        + "\n"
    )


def _names(row: dict[str, Any]) -> tuple[str, str]:
    return METHODS[row["method"]].title, TITLES[row["model"]]


def _plus_minus(found: dict[str, Any], scale: float, digits: int) -> str:
    numbers = [found["mean"], *([] if found["deviation"] is None else [found["deviation"]])]
    return " ± ".join(f"{scale * number:.{digits}f}" for number in numbers)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _csv(table: dict[str, Any]) -> str:
    """A line for each row and number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ("method", "model", "blocks", "parameters", "evaluations")
    writer.writerow((*keys, "quantity", "seeds", "mean", "deviation"))
    for row in table["rows"]:
        numbers = {key: row[key] for key in _ACCURACIES if key in row}
        for group, orders in row["growth"].items():
            numbers |= {f"growth {group} {p}": found for p, found in orders.items()}
        for name, found in numbers.items():
            seeds = " ".join(map(str, row["seeds"]))
            line = (*(row[key] for key in keys), name, seeds, found["mean"], found["deviation"])
            writer.writerow(line)
    return text.getvalue()
