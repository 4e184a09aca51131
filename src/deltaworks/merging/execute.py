"""Execution: stream the blocks of a plan through its operations into the shards of the output."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.pipeline import STAGES, Piece, Pipeline, slots_for
from deltaworks.checkpoints.reader import ByteCounter, page_aligned
from deltaworks.checkpoints.source import Source, are_cached, files_are_cached
from deltaworks.checkpoints.writer import OutputTensor, ShardLayout, ShardWriter, plan_shards
from deltaworks.errors import CheckpointError, NonFiniteError, PlanError
from deltaworks.layers.file import LayerFile
from deltaworks.layers.source import LayerSource
from deltaworks.merging.block_sizes import stream_block_sizes
from deltaworks.merging.methods.operation import Block
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.stream import Rows, TensorStream
from deltaworks.merging.tasks import Task, bytes_to_handle, in_order
from deltaworks.progress import Progress

Slot = TypeVar("Slot")

_BUFFER_BYTES = 256 << 20
_HELD_BYTES = 80 << 20
"""Of blocks that stay in memory between passes, for each pass before the merge: who looks more often gains more."""


@dataclass(slots=True)
class Reads:
    """Bytes read so far, counted where the reads happen."""

    expert: ByteCounter
    base: ByteCounter

    def sources(
        self, plan: Plan, models: Sequence[Model], streams: Iterable[TensorStream], layers: Mapping[int, LayerFile]
    ) -> tuple[dict[int, Source | LayerSource], bool]:
        """The open files of every model that streams of a plan read weights of, by its place in the plan.

        Args:
            plan: the plan.
            models: its models.
            streams: read them.
            layers: of experts; those of an expert that is gone stand in for its files.

        Returns:
            Them, and whether most of what they hold is in memory.
        """
        used = set().union(*(s.sources for s in streams))
        gone = {i: base for i in used if models[i].is_gone and (base := plan.models[i].base) is not None}
        opened = sorted((used - gone.keys()) | set(gone.values()))
        counters = [self.base if m.role == "base" else self.expert for m in plan.models]
        cached = are_cached(models[i] for i in opened)
        sources = {i: Source(models[i], counters[i], direct=not cached) for i in opened}
        restored = {i: LayerSource(layers[i], sources[b], models[b].checkpoint) for i, b in gone.items()}
        return {**sources, **restored}, cached


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the time of a merge went, in seconds; of all the threads of a stage together.

    Attributes:
        read_s, compute_s, write_s: at work; a reader also waits in there for passes before its own.
        read_waited_s: for free buffers: blocks wait for others before them to be committed.
        compute_waited_s: for what is read.
        write_waited_s: for what is computed.
        hash_s, fsync_s: hashing what was written, in order, and flushing finished files; one thread does it.
        commit_waited_s: that thread, for the next block.
        readers, cores, writers: how many threads read, compute and write; no readers where those that compute read.
    """

    read_s: float
    compute_s: float
    write_s: float
    hash_s: float
    fsync_s: float
    read_waited_s: float
    compute_waited_s: float
    write_waited_s: float
    commit_waited_s: float
    readers: int
    cores: int
    writers: int


class Executed(NamedTuple):
    """What became of an execution: where its time went, and whether all that was calculated equals the base."""

    stages: StageTimes
    equals_base: bool


class _Slot:
    """The buffer of what becomes of one block, and while it is read and computed those of its inputs."""

    def __init__(self, out_bytes: int) -> None:
        self.rows: Rows | None = None
        self._out = page_aligned(1, out_bytes + 2 * PAGE)[0]
        self.out = self._out

    def place_out(self, place: int) -> None:
        """Have the result begin at a byte of a page."""
        self.out = self._out[place : place + (len(self._out) - place) // 8 * 8]


def output_shards(plan: Plan) -> list[ShardLayout]:
    """The files of the output, as the plan determines them."""
    return plan_shards((OutputTensor(t.name, t.dtype, t.shape) for t in plan.tensors), plan.shard_bytes)


def execute(
    plan: Plan,
    models: Sequence[Model],
    shards: Sequence[ShardLayout],
    folder: Path,
    options: MergeOptions,
    reads: Reads,
    finished: Callable[[ShardLayout, str, int], None],
    progress: Progress,
    layers: Mapping[int, Path] | None = None,
) -> Executed:
    """Write some shards of a plan.

    What is written hangs on the plan and its inputs alone: not on threads, block size or which shards are asked for.

    Args:
        plan: what to do.
        models: the plan's models, in its order.
        shards: which files of `output_shards` to write.
        folder: where.
        options: block size, threads, and whether NaN may be written.
        reads: bytes read are added to it.
        finished: called with each shard when it is complete and flushed, one at a time, with its BLAKE3 and the bytes
            of experts that went into it.
        progress: told of the bytes that went through.
        layers: files of layers, by the places of their experts in the plan; see `TensorStream`.

    Raises:
        NonFiniteError: a merged tensor holds NaN or infinity.
        CheckpointError: an input cannot be read.
        DeltaworksError: the output cannot be written.
    """
    with open_layers(plan, layers or {}, reads.expert) as opened:
        sizes = stream_block_sizes(plan, min((f.block_size for f in opened.values()), default=options.block_size))
        by_name = {t.name: t for t in plan.tensors}
        shard_of = {t.name: shard for shard in shards for t in shard.tensors}
        streams = [TensorStream(plan, by_name[name], models, sizes[name], folder, opened) for name in shard_of]
        threads = options.threads or os.cpu_count() or 1
        stages = _Stages(plan, models, streams, shard_of, folder, reads, options, finished, progress, opened)
        out_bytes = max((s.tensor.dtype.nbytes(min(s.block_size, s.elements)) for s in streams), default=8)
        rows_bytes = Rows(streams).nbytes
        slots = make_slots(lambda: _Slot(out_bytes), rows_bytes + out_bytes, threads)
        stages.most_held = _HELD_BYTES * max((s.passes for s in streams), default=0) // rows_bytes
        pipeline = Pipeline(
            slots, stages.read, stages.compute, stages.write, stages.commit, threads, reads_on_core=stages.are_cached
        )
        stages.is_stopping = pipeline.stopping.is_set
        progress.start("merge", bytes_to_handle(streams))
        try:
            pipeline.run(in_order([(s,) for s in streams]))
        finally:
            progress.finish()
            stages.close()
        times = StageTimes(
            **{f"{stage}_s": round(pipeline.busy_s[stage], 4) for stage in ("read", "compute", "write")},
            **{f"{stage}_waited_s": round(pipeline.waited_s[stage], 4) for stage in STAGES},
            hash_s=round(stages.hash_s, 4),
            fsync_s=round(stages.fsync_s, 4),
            readers=pipeline.threads["read"],
            cores=threads,
            writers=pipeline.threads["write"],
        )
        return Executed(times, stages.equals_base)


@contextmanager
def open_layers(plan: Plan, paths: Mapping[int, Path], counter: ByteCounter) -> Iterator[dict[int, LayerFile]]:
    """Open files of layers, by the places of their experts in a plan; `counter` counts what is read of them.

    Raises:
        PlanError: the plan was made for layers in other blocks.
        CatalogError: a file is damaged.
    """
    direct = not files_are_cached(paths.values())
    with ExitStack() as stack:
        opened = {}
        for place, path in paths.items():
            opened[place] = file = LayerFile(path, counter, direct=direct)
            stack.callback(file.close)
            if file.block_size != plan.block_size and any(t.depths for t in plan.tensors):
                name = plan.models[place].name
                raise PlanError(f"the layers of {name} were built anew since the plan was made; make it again")
        yield opened


class _Stages:
    """What the threads of the pipeline do with a task."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[Model],
        streams: Sequence[TensorStream],
        shard_of: dict[str, ShardLayout],
        folder: Path,
        reads: Reads,
        options: MergeOptions,
        finished: Callable[[ShardLayout, str, int], None],
        progress: Progress,
        layers: Mapping[int, LayerFile],
    ) -> None:
        self._plan, self._streams, self._shard_of, self._folder = plan, streams, shard_of, folder
        self._options, self._finished, self._progress = options, finished, progress
        self.is_stopping: Callable[[], bool] = bool
        self.fsync_s = self.hash_s = 0.0
        self._free: list[Rows] = []
        self._held: dict[tuple[TensorStream, int], Rows] = {}
        self._staying = self.most_held = 0
        self._is_compared = self._differs = False
        self._writers: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        for stream in streams:
            name = shard_of[stream.tensor.name].name
            self._left[name] = self._left.get(name, 0) + stream.blocks
        self._sources, cached = reads.sources(plan, models, streams, layers)
        self.are_cached = cached and (not layers or files_are_cached(f.path for f in layers.values()))

    def read(self, task: Task, slot: _Slot) -> list[Piece]:
        """Fill the slot's rows with the task's block of every input; returns what is left to be read."""
        # The tasks of the pass before started earlier, so they are on their way through other slots.
        while not task.is_ready(0.1):
            if self.is_stopping():
                return []
        (stream,) = task.streams
        slot.rows = self._take_rows(stream, task)
        return task.fill(self._sources, [slot.rows])

    def _take_rows(self, stream: TensorStream, task: Task) -> Rows:
        rows = self._held.pop((stream, task.index), None)
        if rows is not None:
            rows.stays = task.stage is not None
            return rows
        # The buffers used last, which are still in a cache. They are the larger part of what a block takes, so they are
        # used again while its result is on its way.
        try:
            rows = self._free.pop()
        except IndexError:
            rows = Rows(self._streams)
        rows.stays = task.stage is not None and self._count_staying(1)
        return rows

    def _count_staying(self, change: int) -> bool:
        """Count rows that stay in memory for the next pass; false where one more would be too many."""
        with self._lock:
            fits = self._staying + change <= self.most_held
            self._staying += change if fits else 0
            return fits

    def compute(self, task: Task, slot: _Slot) -> bool:
        """Measure or merge the block in the slot; whether there is anything to write."""
        (stream,) = task.streams
        rows, slot.rows = slot.rows, None
        assert rows is not None
        if task.stage is None:
            self._merge(stream, task, slot, rows)
        else:
            stream.measure(rows, task.index, task.stage)
        if rows.holds and not rows.stays:
            self._count_staying(-1)
        rows.holds = rows.stays
        if rows.stays:
            self._held[stream, task.index] = rows
        else:
            self._free.append(rows)
        return task.stage is None

    def _merge(self, stream: TensorStream, task: Task, slot: _Slot, rows: Rows) -> None:
        tensor = stream.tensor
        slot.place_out(self._writer(tensor.name).place(tensor.name, self._start(task)))
        block = stream.block(rows, task.index, slot.out, tensor.dtype.code)
        try:
            wrong = stream.operation.merge(block)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {tensor.name!r}: {error}") from error
        if wrong and not self._options.allow_nonfinite:
            raise _nonfinite(stream, block, self._plan)
        # The first difference settles it, so merges that change anything compare a block or two.
        if not self._differs and stream.operation.calculates:
            self._differs = not self._equals_base(stream, block)
            self._is_compared = True

    def _equals_base(self, stream: TensorStream, block: Block) -> bool:
        """Whether a merged block is that of the base, bit by bit; False where their element types differ."""
        is_base = self._plan.models[stream.places[0]].role == "base"
        dtype = stream.tensor.dtype
        if not is_base or block.dtype(0) is not dtype:
            return False
        return np.array_equal(block.out[: dtype.nbytes(block.count)], block.raw(0, dtype.bits))

    @property
    def equals_base(self) -> bool:
        """Whether every merged block equals that of the base model; False where nothing is calculated."""
        return self._is_compared and not self._differs

    def write(self, task: Task, slot: _Slot) -> None:
        """Write the merged block."""
        name = task.streams[0].tensor.name
        self._writer(name).write(name, self._start(task), self._merged(task, slot))

    def commit(self, task: Task, slot: _Slot) -> None:
        """Hash the merged block, and finish its shard when it was the last."""
        (stream,) = task.streams
        self._progress.advance(stream.input_bytes(task.index))
        if task.stage is not None:
            return
        tensor = stream.tensor
        shard = self._shard_of[tensor.name]
        started = time.perf_counter()
        self._writers[shard.name].hash(tensor.name, self._start(task), self._merged(task, slot))
        hashed = time.perf_counter()
        self.hash_s += hashed - started
        if task.index == stream.blocks - 1:
            stream.close()
        self._left[shard.name] -= 1
        if not self._left[shard.name]:
            digest = self._writers.pop(shard.name).finish()
            expert_bytes = sum(s.expert_bytes for s in self._streams if self._shard_of[s.tensor.name] is shard)
            self._finished(shard, digest, expert_bytes)
            self.fsync_s += time.perf_counter() - hashed

    def _writer(self, tensor: str) -> ShardWriter:
        shard = self._shard_of[tensor]
        with self._lock:
            if shard.name not in self._writers:
                self._writers[shard.name] = ShardWriter(self._folder / shard.name, shard)
            return self._writers[shard.name]

    @staticmethod
    def _start(task: Task) -> int:
        """Where a block begins in its output tensor, in bytes."""
        (stream,) = task.streams
        return stream.tensor.dtype.nbytes(task.index * stream.block_size)

    @staticmethod
    def _merged(task: Task, slot: _Slot) -> NDArray[np.uint8]:
        (stream,) = task.streams
        merged: NDArray[np.uint8] = slot.out[: stream.tensor.dtype.nbytes(stream.count(task.index))]
        return merged

    def close(self) -> None:
        """Close every file."""
        for source in self._sources.values():
            source.close()
        for writer in self._writers.values():
            writer.close()
        for stream in self._streams:
            stream.close()


def make_slots(make: Callable[[], Slot], nbytes: int, cores: int) -> list[Slot]:
    """Buffers enough to keep every thread busy; fewer, but two, where they would be too large."""
    return [make() for _ in range(max(2, min(slots_for(cores), _BUFFER_BYTES // max(1, nbytes))))]


def _nonfinite(stream: TensorStream, block: Block, plan: Plan) -> NonFiniteError:
    for k, (model, name) in enumerate(stream.tensor.inputs):
        dtype = block.dtype(k)
        if dtype and not np.isfinite(decode_reference(block.raw(k, dtype.bits), dtype)).all():
            return NonFiniteError(
                f"{plan.models[model].name} holds NaN or infinity in tensor {name!r}; mend or leave out this model,"
                " or merge all the same with --allow-nonfinite"
            )
    return NonFiniteError(
        f"tensor {stream.tensor.name!r} of the merge overflows {stream.tensor.dtype.torch_name}; choose a wider"
        " out_dtype, smaller weights, or --allow-nonfinite"
    )
