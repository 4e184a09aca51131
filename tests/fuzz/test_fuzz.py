"""A short run of every fuzz target with a fixed seed; `make fuzz` does more."""

import pytest

from deltaworks.errors import UserError
from fuzz.harness import Target, run
from fuzz.targets import TARGETS

EXECUTIONS = 300


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_of_ours_leave_a_reader(name: str) -> None:
    report = run(TARGETS[name], EXECUTIONS, seed=1)
    assert not report.failures, "\n".join(failure for _, failure in report.failures)
    assert report.executions == EXECUTIONS


@pytest.mark.parametrize("name", TARGETS)
def test_the_documents_to_begin_with_are_valid(name: str, tmp_path: object) -> None:
    """Otherwise every mutation would be refused for the same reason."""
    import random
    from pathlib import Path

    target = TARGETS[name]
    for document in target.seeds():
        content = document if isinstance(document, bytes) else target.write(target.finish(document), random.Random(0))
        target.read(content, Path(str(tmp_path)))


def test_the_harness_notices() -> None:
    def read(content: bytes, folder: object) -> None:
        if b"x" in content:
            raise KeyError(content)
        if b"1" in content:
            raise UserError("y" * 5000)
        if b"2" in content:
            raise UserError("two\nlines")
        raise UserError("one line")

    report = run(Target("t", lambda: [{"a": 0, "b": "x"}], read), 500, seed=0)
    told = "".join(failure for _, failure in report.failures)
    assert "KeyError" in told
    assert "5000 characters" in told
    assert "1 line breaks" in told
