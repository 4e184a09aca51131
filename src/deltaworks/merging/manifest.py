"""The file by which a folder is known to be a snapshot: what was merged, and the hash of every other file."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from blake3 import blake3

from deltaworks.documents import parse_json, read_bytes
from deltaworks.errors import OutputError, quoted

MANIFEST = "deltaworks.json"
MANIFEST_VERSION = 1
PLAN = "deltaworks_plan.json"
RECIPE = "mergekit_config.yml"
DIGEST: Final = "manifest_digest"
"""The member that holds the digest of all others; older manifests have none."""
_MANIFEST_BYTES = 1 << 30
"""Largest manifest that is read, in bytes: as for plans, which hold most of what a manifest holds."""

_TEXT, _COUNT, _NUMBER = (str,), (int,), (int, float)
_MEMBERS: Final[Mapping[str, tuple[type, ...]]] = {
    "plan_digest": _TEXT,
    "method": _TEXT,
    "seed": _COUNT,
    "inputs": (list,),
    "shards": (list,),
    "files": (dict,),
    "expert_bytes": _COUNT,
    "expert_bytes_planned": _COUNT,
    "expert_bytes_read": _COUNT,
    "base_bytes_read": _COUNT,
    "budget_bytes": (int, type(None)),
    "predicted_error": _NUMBER,
    "error_bound": (int, float, type(None)),
    "versions": (dict,),
}
_SHARD: Final[Mapping[str, tuple[type, ...]]] = {"file": _TEXT, "bytes": _COUNT, "blake3": _TEXT}
_INPUT: Final[Mapping[str, tuple[type, ...]]] = {
    "reference": _TEXT,
    "name": _TEXT,
    "role": _TEXT,
    "fingerprint": _TEXT,
    "nbytes": _COUNT,
    "bytes_planned": _COUNT,
}
_ACCOUNT: Final[Mapping[str, tuple[type, ...]]] = {
    "name": _TEXT,
    "tensors": _COUNT,
    "merged": _COUNT,
    "copied": _COUNT,
    "left_out": (dict,),
}
_LATER: Final[Mapping[str, tuple[type, ...]]] = {
    "fingerprint": _TEXT,
    "notes": (list,),
    "accounting": (list,),
    DIGEST: _TEXT,
}


def holds_snapshot(path: Path) -> bool:
    """Whether the folder of a merged model still holds one: its manifest or its weights.

    A folder that cannot be looked into counts as one that does.
    """
    try:
        return (path / MANIFEST).is_file() or any(path.glob("*.safetensors"))
    except OSError:
        return True


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of the snapshot at `out`.

    Raises:
        OutputError: there is none, it is of another version, or a member is missing or of another kind.
    """
    path = out / MANIFEST
    if not path.is_file():
        raise OutputError(f"{out} is not a snapshot: it holds no {MANIFEST}")
    # A plan may predict an error without bound.
    raw = read_bytes(path, "a manifest", OutputError, _MANIFEST_BYTES)
    content = parse_json(raw, str(path), "a manifest", OutputError, finite=False)
    if not isinstance(content, dict) or content.get("deltaworks_manifest") != MANIFEST_VERSION:
        raise OutputError(f"{path} is of another version; use the deltaworks that made it")
    _check(path, content, _MEMBERS)
    # The versions that wrote no digest wrote some other members not always; since then all of them are there.
    later = _LATER if DIGEST in content else {name: kinds for name, kinds in _LATER.items() if name in content}
    _check(path, content, later)
    for member, kinds in (("shards", _SHARD), ("inputs", _INPUT), ("accounting", _ACCOUNT)):
        for i, entry in enumerate(content.get(member, ())):
            if not isinstance(entry, dict):
                raise OutputError(f"{path} is malformed: {member}[{i}] is not an object")
            _check(path, entry, kinds, f"{member}[{i}].")
            if member == "accounting":
                _check_account(path, entry, f"{member}[{i}].")
    _check(path, content["files"], dict.fromkeys(content["files"], _TEXT), "files.")
    for name in listed_files(content):
        if not is_inside(name):
            raise OutputError(f"{path} is malformed: it lists {quoted(name)}, which is not a name inside of the folder")
    return content


def _check(path: Path, content: Mapping[str, Any], members: Mapping[str, tuple[type, ...]], where: str = "") -> None:
    for name, kinds in members.items():
        if name not in content:
            raise OutputError(f"{path} is malformed: it lacks {quoted(where + name)}")
        value = content[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise OutputError(f"{path} is malformed: {quoted(where + name)} is {quoted(value)}")


def _check_account(path: Path, row: Mapping[str, Any], where: str) -> None:
    """Check what a row of `accounting` says of single tensors."""
    _check(path, row["left_out"], dict.fromkeys(row["left_out"], (list,)), f"{where}left_out.")
    for reason, names in row["left_out"].items():
        entries = {str(i): name for i, name in enumerate(names)}
        _check(path, entries, dict.fromkeys(entries, _TEXT), f"{where}left_out.{reason}.")
    if "substituted" in row:
        _check(path, row, {"substituted": (dict,)}, where)
        _check(path, row["substituted"], dict.fromkeys(row["substituted"], _TEXT), f"{where}substituted.")


def listed_files(manifest: Mapping[str, Any]) -> list[str]:
    """The names of all files that a manifest lists."""
    return [*(shard["file"] for shard in manifest["shards"]), *manifest["files"]]


def is_inside(name: str) -> bool:
    """Whether a name is that of a file inside of a folder, whatever stands there: relative, without ``..``."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\0" not in name and str(PurePosixPath(name)) == name and not {"/", ".."} & set(parts)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """BLAKE3 of every member of a manifest but the digest itself, in hex."""
    content = {name: value for name, value in manifest.items() if name != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake3(text.encode("utf-8", "surrogatepass")).hexdigest()
