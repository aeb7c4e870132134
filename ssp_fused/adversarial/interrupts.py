"""Ctrl-C, and SIGTERM, that wait for the end of a batch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar, TypeVar

Item = TypeVar("Item")


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came during training; the message says how to go on."""


class Interrupts:
    """Within it the first Ctrl-C, or SIGTERM, is only noted, and the second stops at once.

    Afterwards the signals' handlers are what they were, also after an exception. Only the main
    thread has a say in signals: elsewhere, and where the process ignores one, nothing changes.
    """

    _AT_ONCE: ClassVar = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }

    def __init__(self) -> None:
        self.noted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in self._AT_ONCE:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    # None: there was a handler that Python does not know.
                    before = signal.signal(number, self._note) or signal.SIG_DFL
                    self._previous[number] = before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.signal(number, self._AT_ONCE[number])

    def watch(self, items: Iterable[Item], agreed: Callable[[bool], bool] = bool) -> Iterator[Item]:
        """The same items, as long as there was no Ctrl-C.

        Args:
            items: what to go through.
            agreed: from whether this process noted a signal to whether to stop; processes that
                work together must stop at the same item.

        Raises:
            TrainingInterrupted: in place of the next item, after a Ctrl-C.
        """
        for item in items:
            if agreed(self.noted):
                raise TrainingInterrupted
            yield item
