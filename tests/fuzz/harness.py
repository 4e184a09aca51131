"""Feed targets with mutations of valid documents; whatever leaves one but a DeltaworksError is a failure."""

import faulthandler
import random
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaworks.errors import DeltaworksError
from fuzz.mutate import as_json, mutate_bytes, mutate_value

SECONDS = 10.0
"""The most that one input may take."""
LONGEST_MESSAGE = 2000
"""Characters in an error: a few quoted values and the paths of a few files."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads a document.

    Attributes:
        name: what is read.
        seeds: valid documents: trees of JSON values, or bytes where the text is what matters.
        read: reads the document, given as bytes, and does with it what commands do; it may write to the folder.
        write: how a tree becomes bytes: `as_json` or `as_yaml`.
        finish: applied to a mutated tree before it is written, such as to renew a digest.
    """

    name: str
    seeds: Callable[[], Sequence[Any]]
    read: Callable[[bytes, Path], object]
    write: Callable[[Any, random.Random], bytes] = as_json
    finish: Callable[[Any], Any] = lambda tree: tree


@dataclass(slots=True)
class Report:
    """What came of a run: executions, how many were accepted, and the inputs that failed with their tracebacks."""

    executions: int = 0
    accepted: int = 0
    failures: list[tuple[bytes, str]] = field(default_factory=list)


class TooSlowError(BaseException):
    """An input took more than SECONDS; no `except Exception` of a reader may catch it."""


def run(target: Target, executions: int, seed: int, *, most_failures: int = 20) -> Report:
    """Feed `target` with so many inputs, the same for the same seed; stops at `most_failures` different tracebacks."""
    rng = random.Random(f"{target.name} {seed}")
    seeds, report, met = target.seeds(), Report(), set()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for document in seeds:
            _compile(target, document, Path(folder))
        for _ in range(executions):
            content = _document(target, rng.choice(seeds), rng)
            report.executions += 1
            failure = _execute(target, content, Path(folder), report)
            if failure is not None and (place := failure.splitlines()[-3:].__repr__()) not in met:
                met.add(place)
                report.failures.append((content, failure))
                if len(report.failures) >= most_failures:
                    break
    return report


def _compile(target: Target, document: Any, folder: Path) -> None:
    """Read a valid document without a time limit: kernels are compiled when they are first needed."""
    with suppress(Exception):
        target.read(document if isinstance(document, bytes) else target.write(document, random.Random(0)), folder)


def _document(target: Target, document: Any, rng: random.Random) -> bytes:
    if isinstance(document, bytes):
        return mutate_bytes(document, rng)
    kind = rng.random()
    tree = target.finish(mutate_value(document, rng) if kind < 0.8 else document)
    content = target.write(tree, rng)
    return content if kind < 0.7 else mutate_bytes(content, rng)


def _execute(target: Target, content: bytes, folder: Path, report: Report) -> str | None:
    try:
        with _time_limit():
            target.read(content, folder)
    except DeltaworksError as error:
        text = str(error)
        if len(text) > LONGEST_MESSAGE or "\n" in text:
            return f"a message of {len(text)} characters and {text.count(chr(10))} line breaks\n{text[:500]!r}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"a message that cannot be printed\n{text[:500]!r}"
    except (Exception, TooSlowError):
        return traceback.format_exc(limit=-6)
    else:
        report.accepted += 1
    return None


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


faulthandler.enable()
