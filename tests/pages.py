"""README and the pages of docs/: their code, command lines, links and names, as they stand in the text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_SETTING = re.compile(r"^(?:[A-Z_]+=\S+ +)+")


class Code(NamedTuple):
    """A fenced block: what stands behind the fence, the line of its first, and its text."""

    info: str
    line: int
    text: str


def code(page: Path) -> list[Code]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Code(found[1], text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> Iterator[str]:
    """What is set as code within sentences, line breaks as spaces."""
    paragraphs = re.sub(r"^ {4}.*$", "", prose(page), flags=re.MULTILINE)
    yield from (" ".join(span.split()) for span in _SPAN.findall(paragraphs))


def commands(page: Path) -> Iterator[str]:
    """Command lines, indented or in a sentence, without comments, settings of variables and the environment's path."""
    indented = re.findall(r"(?:^ {4}.*\n)+", prose(page), re.MULTILINE)
    lines = "".join(map(textwrap.dedent, indented)).splitlines()
    for line in (*lines, *spans(page)):
        command = _SETTING.sub("", line.split("  #")[0].strip()).removeprefix(".venv/bin/")
        if re.match(r"(ssp-fused|torchrun|python|make) ", command):
            yield command


def links(page: Path) -> Iterator[str]:
    """Targets of links and figures."""
    yield from re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """What a link may name behind a page's #."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tables(page: Path) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, without the head and without marks of code."""
    found = re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)
    rows = [[line.strip("|\n ").replace("`", "") for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row.split("|")] for row in table[2:]] for table in rows]
