"""Places in a Markdown document that are filled by the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_BEGIN = re.compile(r"<!-- benchmarks\.report: (?P<name>[^>]*?) -->")
_END = "<!-- end -->"


class MarkerError(ValueError):
    """A document's markers cannot be read; the message names the document and the line."""


def filled(text: str, sections: Mapping[str, Callable[[], str]], name: str) -> str:
    """The document with everything between its markers written anew.

    Args:
        text: Of the document.
        sections: By the name in a marker; called for those that the document has.
        name: Of the document, for errors.

    Raises:
        MarkerError: A marker names no section, has no end, or an end has no beginning.
    """
    lines: list[str] = []
    opened: int | None = None
    for number, line in enumerate(text.split("\n"), 1):
        begins = _BEGIN.fullmatch(line)
        if begins and opened is not None:
            raise MarkerError(
                f"{name}:{number}: the marker of line {opened} must end before this one"
            )
        if line == _END and opened is None:
            raise MarkerError(f"{name}:{number}: {_END} must follow a marker that begins a section")
        if begins:
            if begins["name"] not in sections:
                known = ", ".join(sections)
                raise MarkerError(
                    f"{name}:{number}: unknown section {begins['name']!r}; known: {known}"
                )
            opened = number
            lines += [line, *sections[begins["name"]]().split("\n")]
        elif line == _END:
            opened = None
            lines.append(line)
        elif opened is None:
            lines.append(line)
    if opened is not None:
        raise MarkerError(f"{name}:{opened}: must be closed by {_END}")
    return "\n".join(lines)
