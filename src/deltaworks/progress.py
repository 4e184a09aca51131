"""How long work reports how far it is; the command line draws it, the library never prints."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage after another. Calls may come from any thread."""

    def start(self, label: str, total_bytes: int) -> None:
        """A stage begins that will handle `total_bytes`."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are done."""

    def finish(self) -> None:
        """The stage is over."""

    def note(self, text: str) -> None:
        """Something the user should read."""


def warn(progress: Progress, text: str) -> None:
    """Tell what the user must read: where notes are not shown, progress has a method `warn` for it."""
    getattr(progress, "warn", progress.note)(text)


class Silent:
    """Reports nothing."""

    def start(self, label: str, total_bytes: int) -> None:
        """Ignore the stage."""

    def advance(self, nbytes: int) -> None:
        """Ignore the bytes."""

    def finish(self) -> None:
        """Ignore the end."""

    def note(self, text: str) -> None:
        """Ignore the text."""
