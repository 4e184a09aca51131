"""Layers of a delta, written while it is analyzed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.kept import FILES, keep_files
from deltaworks.catalog.models import Model
from deltaworks.catalog.store import KEPT, Catalog
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.sidecars import sidecar_names
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES, sample_places, signs
from deltaworks.checkpoints.source import Source
from deltaworks.errors import UserError
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.encode import Residuals, encode_block, most_bytes
from deltaworks.layers.file import SHIFTS, LayeredTensor, blocks_sharing, is_layered
from deltaworks.layers.writer import LayerWriter
from deltaworks.units import format_bytes

USUAL_SHARE = 0.57
"""Of an expert's bytes that its layers come to: 0.51 to 0.59 for fine-tunes in BF16, 0.13 of them the drafts."""

Pairs = Sequence[tuple[TensorInfo, TensorInfo]]


class LayerBuffers:
    """What a thread encodes a block with.

    Args:
        block_size: elements in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.packed = np.empty(most_bytes(block_size), np.uint8)
        self.scratch = np.empty((2, len(self.packed)), np.uint8)
        self.ends = np.zeros(DEPTH, np.int64)
        self.left = np.zeros(DEPTH + 1)
        self.sketches = np.zeros((DEPTH - 1, BUCKETS), np.float32)
        self.samples = np.zeros((DEPTH - 1, SAMPLES), np.float32)


class Layering:
    """The layers of one expert on their way to their file. Threads may share it.

    Args:
        path: the file to appear.
        expert: the model.
        base: what its deltas are against.
        pairs: tensors of the base and of the expert that are analyzed.
        block_size: elements a block.
    """

    def __init__(self, path: Path, expert: Model, base: Model, pairs: Pairs, block_size: int) -> None:
        self._path, self._expert, self._block_size = path, expert.path, block_size
        sidecar_names(expert.path)  # what cannot be kept is refused before the weights are read
        self._tensors: list[LayeredTensor] = []
        self._deltas: list[LayeredTensor | None] = []
        self._sharing, self._signs = blocks_sharing(block_size), signs()
        self._parts: dict[int, list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]] = {}
        end = self._residuals = 0
        for b, e in pairs:
            layered = is_layered(e.dtype, b.dtype)
            if layered:
                end = self._add(e, end, is_delta=True)
            self._deltas.append(self._tensors[-1] if layered else None)
        held = {t.name for t in self._tensors}
        # An expert that is gone is to come back whole, so the rest of it is kept as it is.
        self._rest = [t for t in expert.checkpoint.tensors.values() if t.name not in held]
        self._first_rest = end
        for info in self._rest:
            end = self._add(info, end, is_delta=False)
        path.parent.mkdir(exist_ok=True)
        self._about = {"block_size": block_size, "expert": expert.fingerprint, "base": base.fingerprint}
        self._writer = LayerWriter(path, end, self._residuals, block_size)

    def _add(self, info: TensorInfo, first: int, *, is_delta: bool) -> int:
        blocks = max(1, -(-info.count // self._block_size))
        name, dtype, shape = info.name, info.dtype.name, info.shape
        self._tensors.append(LayeredTensor(name, dtype, shape, is_delta, first, blocks, self._residuals))
        self._residuals += -(-blocks // self._sharing) if is_delta else 0
        return first + blocks

    def encode(
        self,
        pair: int,
        base: tuple[TensorInfo, NDArray[np.uint8]],
        expert: tuple[TensorInfo, NDArray[np.uint8]],
        block: int,
        count: int,
        buffers: LayerBuffers,
    ) -> None:
        """Encode a block of a pair of tensors, where that has layers.

        Args:
            pair: which.
            base: the tensor and raw elements (uint8) of the base.
            expert: of the expert.
            block: which.
            count: elements in it.
            buffers: set.
        """
        if self._deltas[pair] is None:
            return
        first, places = block * self._block_size, sample_places(block, count)
        encode_block(
            base[1],
            base[0].dtype.code,
            expert[1],
            expert[0].dtype.code,
            count,
            SHIFTS[expert[0].dtype],
            buffers.scratch,
            buffers.packed,
            buffers.ends,
            buffers.left,
            Residuals(first, self._signs, places, buffers.sketches, buffers.samples),
        )

    def write(self, pair: int, block: int, buffers: LayerBuffers) -> None:
        """Write a block that was encoded."""
        delta = self._deltas[pair]
        if delta is not None:
            self._writer.add(delta.first + block, buffers.packed, buffers.ends, buffers.left)

    def gather(self, pair: int, block: int, buffers: LayerBuffers) -> None:
        """Enter what layers leave of a block that was encoded, with that of the blocks beside it; for one thread."""
        delta = self._deltas[pair]
        if delta is None:
            return
        part = block // self._sharing
        parts = self._parts.setdefault(delta.residual + part, [])
        parts.append((block, buffers.sketches.copy(), buffers.samples.copy()))
        many = min(self._sharing, delta.blocks - part * self._sharing)
        if len(parts) == many:
            del self._parts[delta.residual + part]
            parts.sort(key=lambda p: p[0])
            samples = np.zeros((DEPTH - 1, SAMPLES), np.float32)
            for i, (_, _, own) in enumerate(parts):
                samples[:, i::many] = own[:, i::many]
            self._writer.add_residual(
                delta.residual + part, np.sum([p[1] for p in parts], axis=0, dtype=np.float64), samples
            )

    def commit(self, source: Source) -> None:
        """Write what is not a delta, of the expert's open files, and finish the file."""
        record = self._first_rest
        for info in self._rest:
            for start in range(0, max(1, info.count), self._block_size):
                count = min(self._block_size, info.count - start)
                raw = np.empty(info.dtype.nbytes(count), np.uint8)
                source.read(info, start, count, raw)
                self._writer.add_raw(record, raw)
                record += 1
        # First, so that whoever finds layers finds the rest of the expert too.
        files = keep_files(self._expert, self._path.with_suffix(KEPT))
        self._writer.commit(self._tensors, self._about | {FILES: files})

    def abandon(self) -> None:
        """Leave nothing behind; harmless after `commit`."""
        self._writer.abandon()


def check_room(catalog: Catalog, experts: Sequence[Model], limit: int | None, share: float = 1.0) -> str:
    """What the layers of some experts will take.

    Args:
        catalog: where they go.
        experts: those that have none yet.
        limit: the most that all layers in the catalog may take together; None for what the disk has.
        share: of what the disk has left, the most that they may take.

    Returns:
        A line for people.

    Raises:
        UserError: they would take more than `limit`, or than that share of the disk.
    """
    wanted = round(USUAL_SHARE * sum(e.checkpoint.nbytes for e in experts))
    folder = catalog.path / "layers"
    held = sum(p.stat().st_size for p in folder.glob("*.layers")) if folder.is_dir() else 0
    free = shutil.disk_usage(catalog.path).free
    line = (
        f"the layers of {len(experts)} expert{'s' if len(experts) > 1 else ''} will take about {format_bytes(wanted)}"
        f" in {folder}"
        f" ({format_bytes(held)} there, {format_bytes(free)} free)"
    )
    if limit is not None and held + wanted > limit:
        raise UserError(f"{line}, more than the limit of {format_bytes(limit)}; raise --layers-limit")
    if wanted > share * free:
        what = "there is" if share == 1 else f"{share:.0%} of it"
        raise UserError(f"{line}, more than {what}; make room, or choose with --layers or --no-layers")
    return line
