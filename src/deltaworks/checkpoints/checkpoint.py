"""A model folder in the Hugging Face layout: its tensors, its files, its configuration."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.checkpoints.header import TensorInfo, read_header
from deltaworks.checkpoints.own_files import check_regular, own_file
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One weight file as the file system describes it.

    The change time cannot be set by a program, so two equal records mean untouched bytes.
    """

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "ShardFile":
        """Describe the file at `path`, following links.

        Raises:
            CheckpointError: there is no such file, or it is a named pipe, a device or a folder.
        """
        try:
            s = os.stat(path)  # noqa: PTH116  # one call gives every field
        except OSError as error:
            raise CheckpointError(f"cannot find {path}: {error.strerror}; is the download complete?") from error
        check_regular(path, s.st_mode)
        return cls(path.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose headers have been read.

    Attributes:
        path: the folder.
        shards: its weight files in name order.
        tensors: every tensor by name, in the order of files and data.
        config: `config.json`, or `adapter_config.json` for an adapter; empty where there is none.
        config_file: that file; None where there is none.
        is_adapter: whether it is a PEFT adapter.
    """

    path: Path
    shards: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    config_file: ShardFile | None
    is_adapter: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(s.size for s in self.shards)

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(t.count for t in self.tensors.values())

    def find(self, name: str) -> TensorInfo | None:
        """The tensor `name`; for an `lm_head` that is tied and so left out, the embeddings."""
        tensor = self.tensors.get(name)
        if tensor is None and name.endswith(HEAD):
            return next((t for t in self.tensors.values() if t.name.endswith(EMBEDDINGS)), None)
        return tensor


def open_checkpoint(path: Path, counter: ByteCounter) -> Checkpoint:
    """Read the headers and the configuration of the model folder at `path`.

    Args:
        path: a folder with single or sharded safetensors, or a PEFT adapter.
        counter: every byte read from weight files is added to it.

    Raises:
        CheckpointError: something is missing, malformed or inconsistent.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; a model is a folder with config.json and *.safetensors files")
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    names, weight_map = _weight_files(path, is_adapter=is_adapter)
    shards = tuple(ShardFile.of(path / name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        with RangeReader(path / shard.name, counter) as reader:
            found = read_header(reader)
        tensors |= {n: t for n, t in found.items() if weight_map is None or weight_map.get(n) == shard.name}
    if weight_map is not None and (lost := [n for n in weight_map if n not in tensors]):
        raise CheckpointError(
            f"{path / INDEX} places tensor {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it"
            f" ({len(lost)} such); the shards are of another model: fetch them again"
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    config, config_file = read_config(path, is_adapter=is_adapter)
    return Checkpoint(path, shards, tensors, config, config_file, is_adapter)


def read_config(
    path: Path, known: tuple[dict[str, Any], ShardFile | None] = ({}, None), *, is_adapter: bool
) -> tuple[dict[str, Any], ShardFile | None]:
    """The configuration in a model folder, and its file; empty and None where there is none.

    Args:
        path: the folder.
        known: what this gave before; a file that is untouched since is not read again.
        is_adapter: whether it is a PEFT adapter.

    Raises:
        CheckpointError: it is not a JSON object, or no file of the model; see `own_file`.
    """
    file = path / (ADAPTER_CONFIG if is_adapter else "config.json")
    now = ShardFile.of(file) if own_file(file) is not None else None
    return known if now is not None and now == known[1] else (read_json(file, missing_ok=True), now)


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`; empty where `missing_ok` and there is none.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    if missing_ok and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _weight_files(path: Path, *, is_adapter: bool) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's map of tensors to files where there is an index."""
    if is_adapter:
        return [ADAPTER], None
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in (".", ".."):
                raise CheckpointError(f"{path / INDEX} places tensor {name!r} in {file!r}, which is no plain file name")
        names = sorted(set(weight_map.values()))
        if lost := [n for n in names if not (path / n).is_file()]:
            raise CheckpointError(
                f"{path} lacks {len(lost)} of the {len(names)} files its index names (first: {lost[0]});"
                " finish the download"
            )
        return names, weight_map
    if (path / SINGLE).is_file():
        return [SINGLE], None
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files and no {INDEX}; the index is needed to read them"
        )
    hint = "; convert its pytorch_model.bin to safetensors first" if any(path.glob("*.bin")) else ""
    raise CheckpointError(f"{path} holds no safetensors files{hint}")
