"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deltaworks.checkpoints.compiling import compiling_s, when_compiling
from deltaworks.checkpoints.jit import compiled_before
from deltaworks.progress import Progress as Reports
from deltaworks.progress import Silent
from deltaworks.units import format_bytes

_FIRST_LINE_AFTER = 2.0
_LINE_EVERY = 5.0
_WARM_UP = 20.0
_COMPILING = "compiling {} for this machine, once for this version; this takes about half a minute to a minute"
_COMPILING_MORE = "compiling kernels that were not used on this machine before, once for this version"


def make_progress(*, quiet: bool, computes: bool = True) -> Reports:
    """What the user should see of long work.

    Args:
        quiet: Nothing but what must be read.
        computes: Kernels will run.
    """
    if quiet:
        return Quiet()
    shown: Reports = _bar() if sys.stderr.isatty() else Lines()
    if computes:
        _tell_compiling("codec.decode", "kernels", shown.note)
    return shown


def _tell_compiling(kernel: str, what: str, note: Callable[[str], None]) -> None:
    """Say at once that much is compiled first, or later where it turns out that something is."""
    if compiled_before(kernel):
        when_compiling(lambda: note(_COMPILING_MORE))
        return
    when_compiling(None)
    note(_COMPILING.format(what))


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


def _bar() -> Reports:
    # Rich takes a while to load, and only a terminal has a use for it.
    from deltaworks.cli.bar import Bar

    return Bar()


@contextmanager
def make_counter(label: str, total: int | None, kernel: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Count what is done of long work that is not bytes; yields what to tell how many more are done.

    Args:
        label: What is counted.
        total: How many there will be, None where nobody knows.
        kernel: Of which the user is told if it must be compiled first.
        quiet: Show nothing.
    """
    if quiet:
        yield lambda _: None
        return
    _tell_compiling(kernel, "the twin", _note)
    if sys.stderr.isatty():
        from deltaworks.cli.bar import counting

        with counting(label, total) as count_on:
            yield count_on
        return
    done, due = 0, time.monotonic() + _FIRST_LINE_AFTER

    def count(more: int) -> None:
        nonlocal done, due
        done += more
        if time.monotonic() >= due:
            due = time.monotonic() + _LINE_EVERY
            sys.stderr.write(f"{label}: {done:,}{'' if total is None else f' of {total:,}'}\n")

    yield count


def make_steps(kernel: str, *, quiet: bool) -> Callable[[str], None]:
    """What to tell which step of long work begins; a line is written at most every two seconds.

    Args:
        kernel: Of which the user is told if it must be compiled first.
        quiet: Show nothing.
    """
    started = last = time.monotonic()
    if not quiet:
        _tell_compiling(kernel, "the twin", _note)

    def step(text: str) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last > _FIRST_LINE_AFTER:
            last = time.monotonic()
            sys.stderr.write(f"{time.monotonic() - started:4.0f} s  {text}\n")

    return step


class Quiet(Silent):
    """Shows nothing but what the user must read."""

    def warn(self, text: str) -> None:
        """Print a line."""
        sys.stderr.write(f"note: {text}\n")


class Lines:
    """For logs: silent below two seconds, then a line every five."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._label = ""
        self._done = self._total = 0
        self._started = self._next = self._compiled = 0.0

    def start(self, label: str, total_bytes: int) -> None:
        """Begin a stage."""
        self._label, self._done, self._total = label, 0, total_bytes
        self._started, self._compiled = time.monotonic(), compiling_s()
        self._next = self._started + _FIRST_LINE_AFTER

    def advance(self, nbytes: int) -> None:
        """Count, and print a line where one is due."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            # While kernels are compiled the work stands still.
            elapsed = now - self._started - (compiling_s() - self._compiled)
            # The first kernels compile while the first blocks wait; a rate taken then says nothing.
            warming_up = self._done < self._total / 50 and elapsed < _WARM_UP
            if now < self._next or warming_up:
                return
            self._next = now + _LINE_EVERY
            line = f"{self._label}: {format_bytes(self._done)} of {format_bytes(self._total)}"
            # Tensors without elements advance by nothing, so after any time nothing may be done.
            if self._done > 0 and elapsed > 0:
                rate = self._done / elapsed
                left = max(0, self._total - self._done) / rate
                line += f", {format_bytes(rate)}/s, {left:.0f} s left"
        sys.stderr.write(f"{line}\n")

    def finish(self) -> None:
        """Nothing to take away."""

    def note(self, text: str) -> None:
        """Print a line."""
        sys.stderr.write(f"note: {text}\n")
