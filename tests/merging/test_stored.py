"""Plans by their digests."""

from pathlib import Path

import pytest

from deltaworks.catalog.store import Catalog
from deltaworks.merging.stored import plan_of_digest


@pytest.mark.parametrize("digest", ["", "abc", "ab" * 32, "AB" * 32, "plan.json", "../plan.json", "x" * 5000, "\0"])
def test_what_is_not_a_digest_of_a_plan_is_not_looked_for_as_a_file(
    digest: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed manifest may call anything the digest of its plan."""
    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert plan_of_digest(catalog, digest) is None
