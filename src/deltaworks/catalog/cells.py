"""Parse what the cells of the catalog's database hold.

Rows from before there were checksums may hold anything, so every parser returns None for a cell that does not parse.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaworks.catalog.models import Kind, Model
from deltaworks.checkpoints.checkpoint import Checkpoint, ShardFile
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.header import TensorInfo


def parse_model(row: tuple[Any, ...]) -> Model | None:
    """The model of a row; None where the row does not parse."""
    name, kind, source, path, base, declared, fingerprint, shards, tensors, config = row
    try:
        content, file = json.loads(config)
        checkpoint = Checkpoint(
            Path(path),
            tuple(ShardFile(**s) for s in json.loads(shards)),
            _tensors(tensors),
            content,
            ShardFile(**file) if file else None,
            kind == Kind.ADAPTER,
        )
        return Model(name, Kind(kind), source, base, bool(declared), fingerprint, checkpoint)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a cell; None where it does not parse as one, as in rows from before there were checksums."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def parse_manifest(text: str) -> dict[str, Any] | None:
    """The manifest in a cell; None where it does not parse as one."""
    content = parse_object(text)
    if content is None or not isinstance(content.get("inputs"), list):
        return None
    has_inputs = all(isinstance(i, dict) and isinstance(i.get("fingerprint"), str) for i in content["inputs"])
    return content if has_inputs else None


def row_parses(table: str, row: Sequence[Any]) -> bool:
    """Whether the values of a row, without its checksum, can be read; rows of other tables are made anew anyway."""
    if table == "models":
        return parse_model(tuple(row)) is not None
    return table != "snapshots" or parse_manifest(row[2]) is not None


def parse_cut(text: str) -> list[int] | None:
    """A packed cut in a cell; None where it does not parse as one."""
    try:
        cut = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cut if isinstance(cut, list) and len(cut) == 4 and all(type(n) is int for n in cut) else None


@lru_cache(maxsize=16)
def _tensors(text: str) -> dict[str, TensorInfo]:
    """Tensors by name, as the catalog writes them: the same text for most experts of a family."""
    return {t[0]: TensorInfo(t[0], DTYPES[t[1]], tuple(t[2]), t[3], t[4], t[5]) for t in json.loads(text)}
