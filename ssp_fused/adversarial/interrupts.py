"""Ctrl-C that waits for the end of a batch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C came during training; the message says how to go on."""


class Interrupts:
    """Within it the first Ctrl-C is only noted, and the second stops at once.

    Afterwards the signal's handler is what it was, also after an exception. Only the main thread
    has a say in signals: elsewhere, and where the process ignores Ctrl-C, nothing changes.
    """

    def __init__(self) -> None:
        self.noted = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            # None: there was a handler that Python does not know.
            self._previous = signal.signal(signal.SIGINT, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, as long as there was no Ctrl-C.

        Raises:
            TrainingInterrupted: in place of the next item, after a Ctrl-C.
        """
        for item in items:
            if self.noted:
                raise TrainingInterrupted
            yield item
