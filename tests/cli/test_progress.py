import io
import sys
import threading
import time

import pytest
from numba.core import event

from deltaworks.checkpoints import compiling
from deltaworks.cli.bar import Bar
from deltaworks.cli.progress import Lines, make_progress, make_steps
from deltaworks.progress import Silent


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_logs_get_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock, lines = Clock(monkeypatch), Lines()
    lines.start("merge", 10_000_000_000)
    for _ in range(40):
        clock.now += 0.25
        lines.advance(250_000_000)
    lines.finish()
    assert capsys.readouterr().err.splitlines() == [
        "merge: 2.0 GB of 10.0 GB, 1.0 GB/s, 8 s left",
        "merge: 7.0 GB of 10.0 GB, 1.0 GB/s, 3 s left",
    ]


def test_short_work_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock, lines = Clock(monkeypatch), Lines()
    lines.start("merge", 1000)
    clock.now += 1.9
    lines.advance(1000)
    lines.finish()
    assert capsys.readouterr().err == ""


def test_nothing_is_guessed_from_the_first_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, lines = Clock(monkeypatch), Lines()
    lines.start("merge", 1_000_000)
    clock.now += 3
    lines.advance(300)
    assert capsys.readouterr().err == ""
    clock.now += 27
    lines.advance(300)
    assert capsys.readouterr().err == "merge: 600 B of 1.0 MB, 20 B/s, 49970 s left\n"


def test_the_first_tensors_may_be_empty(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing is done after a long time there is no rate to tell, and none to divide by."""
    clock, lines = Clock(monkeypatch), Lines()
    for total in (1000, 0):
        lines.start("merge", total)
        clock.now += 30
        lines.advance(0)
    assert capsys.readouterr().err.splitlines() == ["merge: 0 B of 1.0 kB", "merge: 0 B of 0 B"]
    lines.start("merge", 1000)
    clock.now += 30
    lines.advance(1500)
    assert capsys.readouterr().err == "merge: 1.5 kB of 1.0 kB, 50 B/s, 0 s left\n"


def test_compiling_does_not_count_in_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, lines = Clock(monkeypatch), Lines()
    compiled = 5.0
    monkeypatch.setattr("deltaworks.cli.progress.compiling_s", lambda: compiled)
    lines.start("merge", 1_000_000_000)
    clock.now, compiled = 140.0, 35.0
    lines.advance(100_000_000)
    assert capsys.readouterr().err == "merge: 100.0 MB of 1.0 GB, 10.0 MB/s, 90 s left\n"


@pytest.mark.parametrize("notes", [0, 1])
def test_compiling_for_long_is_said_once(monkeypatch: pytest.MonkeyPatch, notes: int) -> None:
    """A kernel that calls another is compiled with it; the note comes while it is compiled."""
    said: list[str] = []
    is_said = threading.Event()

    def note() -> None:
        said.append("compiling")
        is_said.set()

    monkeypatch.setattr(compiling, "LONG_S", 3600.0 - 3600.0 * notes)
    watch = compiling._Watch()
    watch.note = note
    for _ in range(2):
        for step in (watch.on_start, watch.on_start, watch.on_end):
            step(event.Event("numba:compile", event.EventStatus.START))  # type: ignore[no-untyped-call]
        if notes:
            assert is_said.wait(60)
        watch.on_end(event.Event("numba:compile", event.EventStatus.END))  # type: ignore[no-untyped-call]
    assert len(said) == notes
    before = watch.so_far_s()
    assert watch.so_far_s() == before


def test_steps_are_told_every_two_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("deltaworks.cli.progress.compiled_before", lambda _: True)
    clock = Clock(monkeypatch)
    told = make_steps("twin.run", quiet=False)
    for now in (101.0, 103.0, 104.0, 105.5):
        clock.now = now
        told(f"at {now:g}")
    assert capsys.readouterr().err == "   3 s  at 103\n   6 s  at 105.5\n"


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().note("look")
    Bar().note("look [here]")
    assert capsys.readouterr().err == "note: look\nnote: look [here]\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = make_progress(quiet=False)
    assert isinstance(shown, Bar)
    shown.start("merge", 4_000_000)
    shown.advance(1_000_000)
    shown.finish()
    shown.advance(1)
    assert "merge" in terminal.getvalue()
    assert "4.0 MB" in terminal.getvalue()


def test_quiet_is_quiet() -> None:
    assert isinstance(make_progress(quiet=True), Silent)
