"""Analysis: one streaming pass over an expert and its base, so that merges need not rescan them."""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltaworks.catalog.distance import FAR_FROM_BASE, far_from
from deltaworks.catalog.histogram import BINS, Histogram
from deltaworks.catalog.layering import LayerBuffers, Layering
from deltaworks.catalog.models import Model
from deltaworks.catalog.statistics import (
    BLOCK_FIELDS,
    FORMAT_VERSION,
    SMALLEST_BLOCK,
    BlockStatistics,
    TensorStatistics,
    add_up,
    check_block_size,
    is_current,
    measure_block,
)
from deltaworks.catalog.statistics_file import StatisticsWriter, check_digest
from deltaworks.catalog.storage import measure_read_cost
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.pipeline import Piece, Pipeline, slots_for
from deltaworks.checkpoints.reader import ByteCounter, page_aligned
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES, sample_places, signs
from deltaworks.checkpoints.source import Source, are_cached, place_in_row
from deltaworks.checkpoints.writer import storage_error
from deltaworks.errors import CatalogError, CheckpointError, DamagedError
from deltaworks.layers.file import LayerIndex
from deltaworks.progress import Progress, Silent

_USUAL_BLOCK = 1 << 20
_BLOCKS_A_MODEL = 256
_UNFINISHED = 4


def default_block_size(base: Model) -> int:
    """1 Mi elements; fewer for a model so small that it would have less than 256 blocks.

    All experts of a base get the same, so that their blocks can be weighed against each other.
    """
    small = base.checkpoint.count // _BLOCKS_A_MODEL
    return min(_USUAL_BLOCK, max(SMALLEST_BLOCK, 1 << max(0, small).bit_length() - 1 if small else 0))


@dataclass(frozen=True, slots=True)
class _Block:
    tensor: int
    block: int
    count: int
    base: TensorInfo
    expert: TensorInfo


class _Slot:
    def __init__(self, nbytes: int, buffers: LayerBuffers | None) -> None:
        self.layers = buffers
        self.rows = page_aligned(2, nbytes + 2 * PAGE)
        self.base, self.expert = self.rows
        self.scratch = np.empty((3, TILE), np.float32)
        self.histogram = np.zeros(BINS, np.uint32)
        self.bins = np.empty(BINS, np.uint16)
        self.counts = np.empty(BINS, np.int64)
        self.used = 0
        self.sketch = np.empty(BUCKETS, np.float32)
        self.sample = np.empty(SAMPLES, np.float32)
        self.values = np.empty(len(BLOCK_FIELDS), np.float64)


def analyze(
    catalog: Catalog,
    expert: Model,
    base: Model,
    *,
    block_size: int | None = None,
    threads: int | None = None,
    force: bool = False,
    layers: bool = False,
    progress: Progress | None = None,
    warns: bool = True,
) -> dict[str, Any]:
    """Measure the delta of `expert` against `base` and keep it, unless the catalog has it already.

    Args:
        catalog: where the statistics go, under both fingerprints.
        expert: the fine-tuned model; its files must be unchanged.
        base: the model it was tuned from; likewise.
        block_size: elements a block; by default what an earlier analysis used, or `default_block_size`.
        threads: compute threads; all cores by default.
        force: measure again.
        layers: keep the delta itself as well, in layers.
        progress: told of the bytes read.
        warns: note where the expert is too far from the base to be a fine-tune of it.

    Returns:
        The summary: `format_version` (of the statistics), `block_size`, `tensors`, `elements`, `zeros` (elements whose
        delta is zero), `relative_norm` (of the delta against the base), `nonfinite` (tensors with NaN or infinity),
        `bytes_read`, `statistics_bytes`, and where layers were asked for `layers_bytes`.

    Raises:
        UserError: the block size is not a power of two from 4 Ki to 4 Mi.
        CheckpointError: the expert's weight files are gone, and the catalog has no statistics of it.
    """
    progress = progress or Silent()
    known = catalog.find_analysis(expert.fingerprint, base.fingerprint)
    layers_file = catalog.layers_file(expert.fingerprint, base.fingerprint)
    has_layers = layers and _are_sound(layers_file)
    is_known = known is not None and (expert.is_gone or _is_sound(known, expert, progress))
    if known is not None and is_known and not force and block_size in (None, known[0]) and (has_layers or not layers):
        return known[2] | (_layers_bytes(layers_file) if layers else {})
    if expert.is_gone:
        raise CheckpointError(f"the weight files of {expert.name} are gone, so it cannot be measured again")
    block_size = check_block_size(block_size or (known[0] if known else default_block_size(base)))
    threads = threads or os.cpu_count() or 1
    pairs = delta_tensors(expert, base)
    counter = ByteCounter()
    path = catalog.statistics_file(expert.fingerprint, base.fingerprint)
    widest = max((t.dtype.bits for pair in pairs for t in pair), default=8) // 8
    most = min(block_size, max((b.count for b, _ in pairs), default=1))
    slots = [_Slot(block_size * widest, LayerBuffers(most) if layers else None) for _ in range(slots_for(threads))]
    measure_read_cost(catalog, expert)
    progress.start(f"analyze {expert.name}", sum(b.nbytes + e.nbytes for b, e in pairs))
    with (
        Source(base, counter, direct=not are_cached([base])) as base_source,
        Source(expert, counter, direct=not are_cached([expert])) as expert_source,
        ExitStack() as unfinished,
    ):
        writer = StatisticsWriter(path, block_size)
        unfinished.callback(writer.abandon)
        layering = Layering(layers_file, expert, base, pairs, block_size) if layers else None
        if layering is not None:
            unfinished.callback(layering.abandon)
        stages = _Stages(base_source, expert_source, pairs, block_size, writer, layering, progress)
        unfinished.callback(stages.close)
        try:
            pipeline = Pipeline(slots, stages.read, stages.compute, stages.write, stages.commit, threads)
            pipeline.run(_blocks(pairs, block_size))
            stages.finish()
            writer.commit()
            if layering is not None:
                layering.commit(expert_source)
        except OSError as error:
            raise storage_error(path, error) from error
        finally:
            progress.finish()
    result = stages.summary.result(block_size, counter.value, path.stat().st_size)
    catalog.save_analysis(expert.fingerprint, base.fingerprint, block_size, path, result)
    if warns and result["relative_norm"] > FAR_FROM_BASE:
        progress.note(far_from(expert.name, base.name, result["relative_norm"]))
    return result | (_layers_bytes(layers_file) if layers else {})


def _is_sound(known: tuple[int, Path, dict[str, Any]], expert: Model, progress: Progress) -> bool:
    """Whether statistics are of this version, and what was written."""
    _, file, summary = known
    if not is_current(summary):
        progress.note(f"the statistics of {expert.name} are of an earlier version, without a digest: measuring again")
        return False
    try:
        return check_digest(file)
    except (DamagedError, OSError) as error:
        progress.note(f"{error}: measuring {expert.name} again")
        return False


def _are_sound(layers: Path) -> bool:
    try:
        return layers.is_file() and bool(LayerIndex(layers).tensors)
    except CatalogError:  # damaged, or of another version
        return False


def _layers_bytes(file: Path) -> dict[str, Any]:
    return {"layers_bytes": file.stat().st_size}


class _Stages:
    """What the threads of the pipeline do with a block."""

    def __init__(
        self,
        base: Source,
        expert: Source,
        pairs: Sequence[tuple[TensorInfo, TensorInfo]],
        block_size: int,
        writer: StatisticsWriter,
        layering: Layering | None,
        progress: Progress,
    ) -> None:
        self._base, self._expert, self._pairs, self._block_size = base, expert, pairs, block_size
        self._writer, self._layering, self._progress = writer, layering, progress
        self._gathered: dict[int, dict[int, BlockStatistics]] = {}
        self._next = 0
        # What is made of a whole tensor would hold up the blocks of the next.
        self._finishing = ThreadPoolExecutor(1)
        self._unfinished: deque[Future[None]] = deque()
        self._signs = signs()
        self.summary = _Summary()

    def read(self, task: _Block, slot: _Slot) -> list[Piece]:
        """Fill the slot with the block of the base; that of the expert is left to be read."""
        start = task.block * self._block_size
        places = [place_in_row(t) for t in (task.base, task.expert)]
        slot.base, slot.expert = (
            row[place : place + (len(row) - place) // 8 * 8] for row, place in zip(slot.rows, places, strict=True)
        )
        self._base.read_row(task.base, start, task.count, slot.rows[0], places[0])
        return [partial(self._expert.read_row, task.expert, start, task.count, slot.rows[1], places[1])]

    def compute(self, task: _Block, slot: _Slot) -> bool:
        """Measure the block in the slot, and encode it; whether there is anything to write."""
        if self._layering is not None and slot.layers is not None:
            self._layering.encode(
                task.tensor, (task.base, slot.base), (task.expert, slot.expert), task.block, task.count, slot.layers
            )
        # All in one call: to wait for the GIL once more would take longer than the work.
        slot.used = measure_block(
            slot.base,
            task.base.dtype.code,
            slot.expert,
            task.expert.dtype.code,
            task.block * self._block_size,
            task.count,
            self._signs,
            slot.scratch,
            slot.histogram,
            slot.bins,
            slot.counts,
            slot.sketch,
            sample_places(task.block, task.count),
            slot.sample,
            slot.values,
        )
        return self._layering is not None and slot.layers is not None

    def write(self, task: _Block, slot: _Slot) -> None:
        """Write the block's layers."""
        if self._layering is not None and slot.layers is not None:
            self._layering.write(task.tensor, task.block, slot.layers)

    def commit(self, task: _Block, slot: _Slot) -> None:
        """Take the result over, and hand on every tensor that is complete, in order."""
        # Only this thread allocates: what many threads allocate and one frees ends up scattered.
        histogram = Histogram(slot.bins[: slot.used].copy(), slot.counts[: slot.used].copy())
        result = BlockStatistics(task.count, slot.values.copy(), slot.sketch.copy(), slot.sample.copy(), histogram)
        self._gathered.setdefault(task.tensor, {})[task.block] = result
        if self._layering is not None and slot.layers is not None:
            self._layering.gather(task.tensor, task.block, slot.layers)
        self._progress.advance(task.base.dtype.nbytes(task.count) + task.expert.dtype.nbytes(task.count))
        while self._next < len(self._pairs):
            found = self._gathered.get(self._next, {})
            pair = self._pairs[self._next]
            if len(found) < _block_count(pair[0], self._block_size):
                return
            ordered = [found[i] for i in range(len(found))]
            self._unfinished.append(self._finishing.submit(self._finish_tensor, pair[1].name, ordered))
            if len(self._unfinished) > _UNFINISHED:
                self._unfinished.popleft().result()
            del self._gathered[self._next]
            self._next += 1

    def _finish_tensor(self, name: str, blocks: list[BlockStatistics]) -> None:
        total = add_up([b.histogram for b in blocks])
        self._writer.add(TensorStatistics(name, self._block_size, total, blocks))
        self.summary.add(name, blocks)

    def finish(self) -> None:
        """Wait until every tensor that is complete is written."""
        while self._unfinished:
            self._unfinished.popleft().result()

    def close(self) -> None:
        """Give up what is not written."""
        self._finishing.shutdown(cancel_futures=True)


def _blocks(pairs: Sequence[tuple[TensorInfo, TensorInfo]], block_size: int) -> Iterator[_Block]:
    for i, (base, expert) in enumerate(pairs):
        for j in range(_block_count(base, block_size)):
            yield _Block(i, j, min(block_size, base.count - j * block_size), base, expert)


def delta_tensors(expert: Model, base: Model) -> list[tuple[TensorInfo, TensorInfo]]:
    """The float tensors in which an expert can differ from its base, as (base's, expert's), in the base's order.

    The expert's entry carries the name under which a merge writes the tensor: an `lm_head` that one of the two leaves
    out because it is tied stands for that model's embeddings.
    """
    names = dict.fromkeys([*base.checkpoint.tensors, *expert.checkpoint.tensors])
    pairs = []
    for name in names:
        b, e = base.checkpoint.find(name), expert.checkpoint.find(name)
        if b is not None and e is not None and b.dtype.is_float and e.dtype.is_float and b.shape == e.shape:
            pairs.append((b, TensorInfo(name, e.dtype, e.shape, e.file, e.offset, e.nbytes)))
    return pairs


def _block_count(tensor: TensorInfo, block_size: int) -> int:
    return max(1, -(-tensor.count // block_size))


class _Summary:
    def __init__(self) -> None:
        self.tensors = self.elements = 0
        self.values = np.zeros(len(BLOCK_FIELDS))
        self.nonfinite: list[str] = []

    def add(self, name: str, blocks: list[BlockStatistics]) -> None:
        values = np.sum([b.values for b in blocks], axis=0)
        self.tensors += 1
        self.elements += sum(b.elements for b in blocks)
        if values[BLOCK_FIELDS.index("nonfinite")]:
            self.nonfinite.append(name)
        else:
            self.values += values

    def result(self, block_size: int, bytes_read: int, statistics_bytes: int) -> dict[str, Any]:
        delta, base = (self.values[BLOCK_FIELDS.index(f)] for f in ("delta_square", "base_square"))
        return {
            "format_version": FORMAT_VERSION,
            "block_size": block_size,
            "tensors": self.tensors,
            "elements": self.elements,
            "zeros": int(self.values[BLOCK_FIELDS.index("zeros")]),
            "relative_norm": math.sqrt(delta / base) if base > 0 else math.inf if delta > 0 else 0.0,
            "nonfinite": self.nonfinite,
            "bytes_read": bytes_read,
            "statistics_bytes": statistics_bytes,
        }
