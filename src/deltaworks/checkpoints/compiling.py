"""Whether kernels are being compiled: each is when it is first called, once on a machine for each version."""

import threading
import time
from collections.abc import Callable

from numba.core import event

LONG_S = 2.0
"""Seconds of compiling after which it is worth a note."""


class _Watch(event.Listener):
    """Measures compiling, and says so once where it takes long.

    Numba compiles under a lock of its own, kernels that one calls within its own compilation.
    """

    def __init__(self) -> None:
        self.note: Callable[[], None] | None = None
        self.spent_s = 0.0
        self._depth, self._since = 0, 0.0
        self._timer: threading.Timer | None = None

    def on_start(self, event: event.Event) -> None:
        """A kernel is compiled."""
        del event
        self._depth += 1
        if self._depth == 1:
            self._since = time.monotonic()
            if self.note is not None:
                self._timer = threading.Timer(max(LONG_S - self.spent_s, 0.0), self._say)
                self._timer.daemon = True
                self._timer.start()

    def on_end(self, event: event.Event) -> None:
        """It was compiled."""
        del event
        self._depth -= 1
        if self._depth == 0:
            self.spent_s += time.monotonic() - self._since
            if self._timer is not None:
                self._timer.cancel()

    def so_far_s(self) -> float:
        """Seconds spent on compiling in this process, with what is under way."""
        return self.spent_s + (time.monotonic() - self._since if self._depth else 0.0)

    def _say(self) -> None:
        note, self.note = self.note, None
        if note is not None:
            note()


_WATCH = _Watch()
event.register("numba:compile", _WATCH)  # type: ignore[no-untyped-call]


def compiling_s() -> float:
    """Seconds spent on compiling in this process so far."""
    return _WATCH.so_far_s()


def when_compiling(note: Callable[[], None] | None) -> None:
    """Call ``note`` once as soon as compiling has taken `LONG_S` in this process, from a thread; None for never."""
    _WATCH.note = note
