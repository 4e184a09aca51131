"""Execution: stream the blocks of a plan through its operations into the shards of the output."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.analyze import check_block_size
from deltaworks.catalog.models import Model
from deltaworks.catalog.statistics import DEFAULT_BLOCK_SIZE
from deltaworks.checkpoints.codec import TILE, decode_reference
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.pipeline import Pipeline
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.checkpoints.writer import OutputTensor, ShardLayout, ShardWriter, plan_shards
from deltaworks.errors import CheckpointError, NonFiniteError
from deltaworks.merging.methods.operation import Block, Operation, exact_sums
from deltaworks.merging.plan import Plan, PlannedTensor
from deltaworks.merging.prepare import MergeOptions
from deltaworks.progress import Progress

_READERS = 2
_BUFFER_BYTES = 512 << 20


@dataclass(slots=True)
class Reads:
    """Bytes read so far, counted where the reads happen."""

    expert: ByteCounter
    base: ByteCounter


@dataclass(frozen=True, slots=True)
class _Task:
    """One block on its way: of which job, measured or merged."""

    job: "_Job"
    index: int
    measures: bool


class _Job:
    """One output tensor on its way."""

    def __init__(self, shard: ShardLayout, tensor: PlannedTensor, inputs: list[TensorInfo], block_size: int) -> None:
        self.shard, self.tensor, self.inputs, self.block_size = shard, tensor, inputs, block_size
        self.elements = tensor.count
        self.blocks = max(1, -(-self.elements // block_size))
        self.codes = np.array([t.dtype.code for t in inputs], np.int64)
        self.operation: Operation = tensor.operation
        self.settled = threading.Event()
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._lock = threading.Lock()
        if not self.operation.needs_sums:
            self.settled.set()

    def count(self, index: int) -> int:
        return min(self.block_size, self.elements - index * self.block_size)

    def input_bytes(self, index: int) -> int:
        return sum(t.dtype.nbytes(self.count(index)) for t in self.inputs)

    def add_sums(self, index: int, sums: NDArray[np.float64]) -> None:
        with self._lock:
            self._sums[index] = sums
            complete = len(self._sums) == self.blocks
        if complete:
            self.operation = self.operation.settle(exact_sums(list(self._sums.values())))
            self._sums.clear()
            self.settled.set()

    def tasks(self, *, measures: bool) -> Iterator[_Task]:
        return (_Task(self, i, measures) for i in range(self.blocks))


class _Slot:
    """The buffers of one block."""

    def __init__(self, inputs: int, row_bytes: int, out_bytes: int) -> None:
        self.rows = np.empty((inputs, row_bytes), np.uint8)
        self.out = np.empty(out_bytes, np.uint8)
        self.scratch = np.empty((inputs + 3, TILE), np.float32)


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
    finished: Callable[[ShardLayout], None],
    progress: Progress,
) -> None:
    """Write some shards of a plan.

    What is written hangs on the plan and its inputs alone: not on threads, block size or which shards are asked for.

    Args:
        plan: what to do.
        models: the plan's models, in its order.
        shards: which files of `output_shards` to write.
        folder: where.
        options: block size, threads, and whether NaN may be written.
        reads: bytes read are added to it.
        finished: called with each shard when it is complete and flushed, one at a time.
        progress: told of the bytes read.

    Raises:
        NonFiniteError: a merged tensor holds NaN or infinity.
        CheckpointError: an input cannot be read.
        DeltaworksError: the output cannot be written.
    """
    block_size = _block_size(plan, options)
    by_name = {t.name: t for t in plan.tensors}
    jobs = [_job(shard, by_name[t.name], models, block_size) for shard in shards for t in shard.tensors]
    threads = options.threads or os.cpu_count() or 1
    stages = _Stages(plan, models, jobs, folder, reads, options, finished, progress)
    slots = _slots(jobs, block_size, threads + _READERS + 1)
    pipeline = Pipeline(slots, stages.read, stages.compute, stages.write, _READERS, threads)
    stages.stopping = pipeline.stopping
    passes = sum(j.input_bytes(i) * (2 if j.operation.needs_sums else 1) for j in jobs for i in range(j.blocks))
    progress.start("merge", passes)
    try:
        pipeline.run(_in_order(jobs))
    finally:
        progress.finish()
        stages.close()


class _Stages:
    """What the threads of the pipeline do with a task."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[Model],
        jobs: Sequence[_Job],
        folder: Path,
        reads: Reads,
        options: MergeOptions,
        finished: Callable[[ShardLayout], None],
        progress: Progress,
    ) -> None:
        self._plan, self._folder, self._options = plan, folder, options
        self._finished, self._progress = finished, progress
        self.stopping = threading.Event()
        self._writers: dict[str, ShardWriter] = {}
        self._left: dict[str, int] = {}
        for job in jobs:
            self._left[job.shard.name] = self._left.get(job.shard.name, 0) + job.blocks
        used = sorted({i for job in jobs for i, _ in job.tensor.inputs})
        counters = [reads.base if m.role == "base" else reads.expert for m in plan.models]
        self._sources = {i: Source(models[i], counters[i]) for i in used}

    def read(self, task: _Task, slot: _Slot) -> None:
        """Fill the slot's rows with the task's block of every input."""
        job = task.job
        if not task.measures:
            # The tasks that measure its sums started earlier, so they are on their way through other slots.
            while not job.settled.wait(0.1):
                if self.stopping.is_set():
                    return
        start, count = task.index * job.block_size, job.count(task.index)
        for row, (model, _), info in zip(slot.rows, job.tensor.inputs, job.inputs, strict=False):
            self._sources[model].read(info, start, count, row)

    def compute(self, task: _Task, slot: _Slot) -> None:
        """Measure or merge the block in the slot."""
        job = task.job
        block = Block(
            slot.rows,
            job.codes,
            task.index * job.block_size,
            job.count(task.index),
            slot.scratch,
            slot.out,
            job.tensor.dtype.code,
        )
        if task.measures:
            job.add_sums(task.index, job.operation.measure(block))
            return
        try:
            wrong = job.operation.merge(block)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {job.tensor.name!r}: {error}") from error
        if wrong and not self._options.allow_nonfinite:
            raise _nonfinite(job, block, self._plan)

    def write(self, task: _Task, slot: _Slot) -> None:
        """Write the merged block, and finish its shard when it was the last."""
        job, shard = task.job, task.job.shard
        self._progress.advance(job.input_bytes(task.index))
        if task.measures:
            return
        if shard.name not in self._writers:
            self._writers[shard.name] = ShardWriter(self._folder / shard.name, shard)
        dtype = job.tensor.dtype
        nbytes = dtype.nbytes(job.count(task.index))
        self._writers[shard.name].write(job.tensor.name, dtype.nbytes(task.index * job.block_size), slot.out[:nbytes])
        self._left[shard.name] -= 1
        if not self._left[shard.name]:
            self._writers.pop(shard.name).finish()
            self._finished(shard)

    def close(self) -> None:
        """Close every file."""
        for source in self._sources.values():
            source.close()
        for writer in self._writers.values():
            writer.close()


def _slots(jobs: Sequence[_Job], block_size: int, count: int) -> list[_Slot]:
    """`count` buffers large enough for the largest block of any job; fewer, but two, where they would be too large."""
    inputs = max((len(j.inputs) for j in jobs), default=1)
    elements = min(block_size, -(-max((j.elements for j in jobs), default=1) // 8) * 8) or 8
    row_bits = max((t.dtype.bits for j in jobs for t in j.inputs), default=8)
    out_bits = max((j.tensor.dtype.bits for j in jobs), default=8)
    row_bytes, out_bytes = elements * row_bits // 8, elements * out_bits // 8
    affordable = _BUFFER_BYTES // (inputs * row_bytes + out_bytes)
    return [_Slot(inputs, row_bytes, out_bytes) for _ in range(max(2, min(count, affordable)))]


def _job(shard: ShardLayout, tensor: PlannedTensor, models: Sequence[Model], block_size: int) -> _Job:
    infos = []
    for model, name in tensor.inputs:
        info = models[model].checkpoint.find(name)
        if info is None or info.shape != tensor.shape:
            raise CheckpointError(f"{models[model].name} no longer holds the tensor {name!r} that the plan reads")
        infos.append(info)
    return _Job(shard, tensor, infos, block_size)


def _in_order(jobs: Sequence[_Job]) -> Iterator[_Task]:
    """Blocks in the order of the output; a tensor's first pass runs one tensor ahead, so that nobody waits for it."""
    for i, job in enumerate(jobs):
        ahead = jobs[i : i + 2] if i == 0 else jobs[i + 1 : i + 2]
        for other in ahead:
            if other.operation.needs_sums:
                yield from other.tasks(measures=True)
        yield from job.tasks(measures=False)


def _block_size(plan: Plan, options: MergeOptions) -> int:
    """The block size asked for, or the larger one that an operation needs; both are powers of two."""
    wanted = check_block_size(options.block_size or DEFAULT_BLOCK_SIZE)
    return max([wanted, *(t.operation.alignment for t in plan.tensors)])


def _nonfinite(job: _Job, block: Block, plan: Plan) -> NonFiniteError:
    for row, info, (model, name) in zip(block.rows, job.inputs, job.tensor.inputs, strict=False):
        values = decode_reference(row[: info.dtype.nbytes(block.count)], info.dtype)
        if not np.isfinite(values).all():
            return NonFiniteError(
                f"{plan.models[model].name} holds NaN or infinity in tensor {name!r}; mend or leave out this model,"
                " or merge all the same with --allow-nonfinite"
            )
    return NonFiniteError(
        f"tensor {job.tensor.name!r} of the merge overflows {job.tensor.dtype.torch_name}; choose a wider out_dtype,"
        " smaller weights, or --allow-nonfinite"
    )
