"""A model folder in the Hugging Face layout: its tensors, its files, its configuration."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.checkpoints.header import TensorInfo, read_header
from deltaworks.checkpoints.json_files import read_json
from deltaworks.checkpoints.own_files import check_regular, own_file
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.tensor_names import HEAD, is_embeddings, is_recomputed
from deltaworks.checkpoints.weight_files import ADAPTER_CONFIG, INDEX, SINGLE, find_weight_files
from deltaworks.errors import CheckpointError, quoted


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
            return next((t for t in self.tensors.values() if is_embeddings(t.name)), None)
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
    found = find_weight_files(path, is_adapter=is_adapter)
    shards = tuple(ShardFile.of(path / name) for name in found.names)
    tensors = _read_headers(path, shards, found.weight_map, counter)
    for name in found.unlisted:
        if _read_headers(path, (ShardFile.of(path / name),), None, counter):
            raise CheckpointError(
                f"{path} holds {name}, which belongs to the shards that {INDEX} names and is not named by it, so"
                " loaders differ in whether they read it; fetch the index again, or remove the file"
            )
    if found.alternatives:
        others = _read_headers(path, tuple(ShardFile.of(path / name) for name in found.alternatives), None, counter)
        _check_same_weights(path, tensors, others, found.alternatives, counter)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    config, config_file = read_config(path, is_adapter=is_adapter)
    return Checkpoint(path, shards, tensors, config, config_file, is_adapter)


def _read_headers(
    path: Path, shards: Sequence[ShardFile], weight_map: Mapping[str, str] | None, counter: ByteCounter
) -> dict[str, TensorInfo]:
    """The tensors of weight files by name; those of an index's `weight_map` must be all there are.

    Raises:
        CheckpointError: a tensor stands twice, or the index and the files do not agree.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        with RangeReader(path / shard.name, counter) as reader:
            own = read_header(reader)
        if twice := [n for n in own if n in tensors]:
            raise CheckpointError(
                f"{path}: tensor {quoted(twice[0])} stands both in {tensors[twice[0]].file} and in {shard.name}"
                f" ({len(twice)} such), so it is not clear which is meant; fetch the shards again"
            )
        tensors |= own
    if weight_map is None:
        return tensors
    if lost := [n for n, file in weight_map.items() if n not in tensors or tensors[n].file != file]:
        raise CheckpointError(
            f"{path / INDEX} places tensor {quoted(lost[0])} in {weight_map[lost[0]]}, which does not hold it"
            f" ({len(lost)} such); the shards are of another model: fetch them again"
        )
    unlisted = [n for n in tensors if n not in weight_map]
    if unknown := [n for n in unlisted if not is_recomputed(tensors[n])]:
        raise CheckpointError(
            f"{path}: {tensors[unknown[0]].file} holds tensor {quoted(unknown[0])}, which {INDEX} does not list"
            f" ({len(unknown)} such), so loaders differ in whether they read it; fetch the index again, or write the"
            " model anew with its current weights"
        )
    return {n: t for n, t in tensors.items() if n in weight_map}


def _check_same_weights(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    others: Mapping[str, TensorInfo],
    alternatives: Sequence[str],
    counter: ByteCounter,
) -> None:
    """Make sure that two sets of weights in one folder hold the same.

    Raises:
        CheckpointError: they do not.
    """
    differs = next((n for n in (*tensors, *others) if n not in tensors or n not in others), None)
    if differs is None:
        with ExitStack() as stack:
            files = {t.file for t in (*tensors.values(), *others.values())}
            readers = {f: stack.enter_context(RangeReader(path / f, counter)) for f in files}
            differs = next((n for n, t in tensors.items() if not _is_same(readers, t, others[n])), None)
    if differs is not None:
        more = f" and {len(alternatives) - 1} more" if len(alternatives) > 1 else ""
        raise CheckpointError(
            f"{path} holds two sets of weights that differ (first in tensor {quoted(differs)}): {SINGLE}, which"
            f" transformers loads, and {alternatives[0]}{more}, which"
            f" {INDEX} names; remove the set that is not meant"
        )


def _is_same(readers: Mapping[str, RangeReader], one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 8 << 20
    return all(
        readers[one.file].read(one.offset + start, min(step, one.nbytes - start))
        == readers[other.file].read(other.offset + start, min(step, one.nbytes - start))
        for start in range(0, one.nbytes, step)
    )


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
