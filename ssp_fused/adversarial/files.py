"""Files that are replaced whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give `path` the contents that `write` puts into the file it is called with.

    The file of that name is replaced only once the new one is whole on the disk: a crash, a full
    disk or Ctrl-C leaves the old one as it was, or none where there was none.

    Args:
        path: the file; its folder must exist.
        write: called once with the open file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # The new name is durable only when the folder is on the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`replace_file` with a text, in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`replace_file` with a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_writable(path: Path, argument: str) -> None:
    """Find out that a result cannot be written before it is computed.

    Args:
        path: the file to write later.
        argument: what the caller's message names it by.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{argument} must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{argument}: there is no folder {path.parent}")
