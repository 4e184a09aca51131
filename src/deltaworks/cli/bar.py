"""Progress bars for terminals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """A bar with bytes, rate and time left; gone when the stage is over."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, label: str, total_bytes: int) -> None:
        """Show a bar for a stage."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task(label, total=total_bytes)
        self._progress.start()

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.advance(self._task, nbytes)

    def finish(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def counting(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar that counts things; yields what to tell how many more are done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)
