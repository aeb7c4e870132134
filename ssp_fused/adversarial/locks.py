"""Locks between processes that work in one folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which is created if need be; a process that dies lets go of it.

    Args:
        path: the file; its folder must exist. It stays, empty.
        wait: until another process lets go of it.

    Yields:
        Whether the lock is held; always true with `wait`.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
