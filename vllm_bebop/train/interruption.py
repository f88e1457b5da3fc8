"""Ctrl-C and SIGTERM as a wish to stop, for work that must first save what it has."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MESSAGE = b"\nstopping behind the update under way, with a checkpoint; the same once more stops at once\n"
_ECHO_SECONDS = 2.0  # torchrun passes on what whoever ends a job sends to its processes too


class Interruption:
    """While it is entered the first of these signals is only noted; one that comes later does what it always did.

    Nothing is noted outside the main thread, where Python handles no signals, nor of a signal that is ignored (nohup).
    """

    def __init__(self) -> None:
        self._noted_at: float | None = None
        self._before: dict[signal.Signals, Callable[..., Any] | int] = {}

    @property
    def is_wanted(self) -> bool:
        return self._noted_at is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _frame: object) -> None:
        if self._noted_at is None:
            self._noted_at = time.monotonic()
            os.write(2, _MESSAGE)  # print may be what was interrupted, and does not enter itself twice
        elif time.monotonic() - self._noted_at > _ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)
