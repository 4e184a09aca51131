"""Outputs: whole or not at all, links followed, devices written to."""

import os
from pathlib import Path

import pytest

from deltaworks.errors import OutputError
from deltaworks.outputs import check_file, write_file


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file.json"
    write_file(file, "old \u00fc")
    assert file.read_bytes() == "old \u00fc".encode()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device", "/elsewhere")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_file(file, "new")
    assert raised.value.filename == str(file)
    assert file.read_bytes() == "old \u00fc".encode()
    assert list(file.parent.iterdir()) == [file]


def test_a_link_stays_and_leads_to_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder/file")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_a_device_is_written_to() -> None:
    check_file(Path("/dev/null"), "kind", force=False)
    write_file(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(("name", "force", "said"), [
    ("own", False, None),
    ("other", False, "other: exists and is something else; add --force to replace it"),
    ("other", True, None),
    ("empty", False, "empty: exists and is something else"),
    ("link", False, "link: exists and is something else; add --force"),
    ("new", False, None),
    ("new/deep", False, None),
    (".", True, "is a folder; choose a file"),
])  # fmt: skip
def test_a_file_of_another_kind_is_replaced_on_demand_only(
    tmp_path: Path, name: str, force: bool, said: str | None
) -> None:
    (tmp_path / "own").write_text('{"kind": 1}')
    (tmp_path / "other").write_text('{"thesis": "kind"}')
    (tmp_path / "empty").write_text("")
    (tmp_path / "link").symlink_to("other")
    if said is None:
        check_file(tmp_path / name, "kind", force=force)
        return
    with pytest.raises(OutputError, match=said):
        check_file(tmp_path / name, "kind", force=force)
