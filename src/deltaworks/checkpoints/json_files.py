"""The JSON files of a model folder: configurations, indices, tokenizers."""

from pathlib import Path
from typing import Any

from deltaworks.checkpoints.downloads import HEAD_BYTES, check_file
from deltaworks.documents import parse_json, read_bytes
from deltaworks.errors import CheckpointError

_JSON_BYTES = 256 << 20
"""The largest file that is read: tokenizers of large vocabularies take tens of megabytes."""


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`; empty where `missing_ok` and there is none.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    if missing_ok and not path.exists():
        return {}
    raw = read_bytes(path, "JSON", CheckpointError, _JSON_BYTES)
    check_file(path, raw[:HEAD_BYTES], len(raw))
    # Configurations that transformers writes may hold infinity.
    content = parse_json(raw, str(path), "JSON", CheckpointError, finite=False)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
