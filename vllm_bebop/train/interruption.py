"""Ctrl-C and SIGTERM as a wish to stop, for work that must first save what it has."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MESSAGE = b"\nstopping behind the update under way, with a checkpoint; the same again stops at once\n"


class Interruption:
    """While it is entered the first of these signals is only noted; the next one does what it always did.

    Nothing is noted outside the main thread, where Python handles no signals, nor of a signal that is ignored (nohup).
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self._before: dict[signal.Signals, Callable[..., Any] | int] = {}

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

    def _note(self, *_: object) -> None:
        self.is_wanted = True
        self.__exit__()
        os.write(2, _MESSAGE)  # print may be what was interrupted, and does not enter itself twice
