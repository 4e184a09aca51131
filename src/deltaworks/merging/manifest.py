"""The file by which a folder is known to be a snapshot: what was merged, and the hash of every other file."""

from pathlib import Path
from typing import Any

from deltaworks.checkpoints.json_files import read_json
from deltaworks.errors import OutputError

MANIFEST = "deltaworks.json"
MANIFEST_VERSION = 1


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of the snapshot at `out`.

    Raises:
        OutputError: there is none, or it is of another version.
    """
    if not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is no snapshot: it holds no {MANIFEST}")
    manifest = read_json(out / MANIFEST)
    if manifest.get("deltaworks_manifest") != MANIFEST_VERSION:
        raise OutputError(f"{out / MANIFEST} is of another version; use the deltaworks that made it")
    return manifest
