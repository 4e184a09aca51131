"""The real error of a merge within a budget: both merges are computed and compared, and nothing is written."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.dtypes import F32
from deltaworks.checkpoints.pipeline import Piece, Pipeline
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.layers.file import LayerFile
from deltaworks.merging.block_sizes import stream_block_sizes
from deltaworks.merging.execute import Reads, make_slots, open_layers
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.plan import Plan, PlannedTensor
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.stream import Rows, TensorStream
from deltaworks.merging.tasks import Task, bytes_to_handle, in_order
from deltaworks.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class MeasuredError:
    """What a budget really cost, in float32 before rounding to the output's type.

    Attributes:
        lost: squared L2 distance from the full merge, by tensor.
        full: squared L2 distance of the full merge from the base, by tensor.
    """

    lost: dict[str, float]
    full: dict[str, float]

    @property
    def relative(self) -> float:
        """Of all tensors: zero where nothing is lost, 1 where something is and the full merge changes nothing."""
        lost, full = math.fsum(self.lost.values()), math.fsum(self.full.values())
        return 0.0 if lost == 0 else math.sqrt(lost / full) if full > 0 else 1.0


def measure_error(
    plan: Plan,
    models: Sequence[Model],
    options: MergeOptions | None = None,
    *,
    layers: Mapping[int, Path] | None = None,
    spool: Path | None = None,
    progress: Progress | None = None,
) -> MeasuredError:
    """Compare what `plan` makes with what it would make if it read everything.

    Experts are read in full, whatever the budget.

    Args:
        plan: the plan.
        models: its models, in its order, unchanged.
        options: block size and threads.
        layers: the files of layers that the plan reads, by the places of their experts in it.
        spool: folder for what operations need twice; the system's temporary one by default.
        progress: told of the bytes that went through.
    """
    options, progress = options or MergeOptions(), progress or Silent()
    weighed = [t for t in plan.tensors if t.stand_in is not None and t.dtype.is_float]
    if not weighed:
        return MeasuredError({}, {})
    # All of every tensor is read, to be compared with.
    whole = replace(plan, tensors=tuple(t if t.depths else replace(t, reads=()) for t in weighed))
    sizes = stream_block_sizes(whole, options.block_size)
    folder = spool or Path(tempfile.gettempdir())
    with open_layers(plan, layers or {}, ByteCounter()) as opened:
        groups = [_group(plan, t, models, sizes[t.name], folder, opened) for t in weighed]
        streams = [s for group in groups for s in group]
        threads = options.threads or os.cpu_count() or 1
        stages = _Stages(plan, models, streams, progress, opened)
        elements = max(min(s.block_size, s.elements) for s in streams)
        one = _Slot(streams, elements)
        nbytes = sum(r.nbytes for r in one.rows) + one.out.nbytes
        slots = make_slots(lambda: _Slot(streams, elements), nbytes, threads)
        pipeline = Pipeline(slots, stages.read, stages.compute, lambda *_: None, stages.commit, threads)
        stages.is_stopping = pipeline.stopping.is_set
        progress.start("measure the error", bytes_to_handle(streams))
        try:
            pipeline.run(in_order(groups))
        finally:
            progress.finish()
            for source in stages.sources.values():
                source.close()
            for stream in streams:
                stream.close()
        return MeasuredError(
            {t.name: math.fsum(stages.lost[t.name]) for t in weighed},
            {t.name: math.fsum(stages.full[t.name]) for t in weighed},
        )


def _group(
    plan: Plan,
    tensor: PlannedTensor,
    models: Sequence[Model],
    block_size: int,
    spool: Path,
    layers: Mapping[int, LayerFile],
) -> tuple[TensorStream, TensorStream, TensorStream]:
    """The tensor as planned, the tensor if everything were read, and the base's."""
    stand_in = tensor.stand_in
    assert stand_in is not None
    # Copies keep the type of what they copy; here everything is compared in float32.
    operation = WeightedSum((1.0,), normalize=False) if isinstance(tensor.operation, Copy) else tensor.operation
    tensor = replace(tensor, operation=operation)
    full = replace(tensor, reads=(), depths=(), stand_in=None)
    base = replace(full, inputs=(stand_in,), operation=WeightedSum((1.0,), normalize=False))
    planned = TensorStream(plan, tensor, models, block_size, spool, layers)
    others = [TensorStream(plan, t, models, planned.block_size, spool) for t in (full, base)]
    return planned, others[0], others[1]


class _Slot:
    def __init__(self, streams: Sequence[TensorStream], elements: int) -> None:
        self.rows = [Rows(streams) for _ in range(3)]
        self.out = np.empty((3, -(-elements // 8) * 8), np.float32)
        self.lost = self.full = 0.0


class _Stages:
    def __init__(
        self,
        plan: Plan,
        models: Sequence[Model],
        streams: Sequence[TensorStream],
        progress: Progress,
        layers: Mapping[int, LayerFile],
    ) -> None:
        self.sources, _ = Reads(ByteCounter(), ByteCounter()).sources(plan, models, streams, layers)
        self.is_stopping: Callable[[], bool] = bool
        self._progress = progress
        self.lost: dict[str, list[float]] = {}
        self.full: dict[str, list[float]] = {}

    def read(self, task: Task, slot: _Slot) -> list[Piece]:
        while not task.is_ready(0.1):
            if self.is_stopping():
                return []
        return task.fill(self.sources, slot.rows)

    def compute(self, task: Task, slot: _Slot) -> bool:
        if task.stage is not None:
            task.streams[0].measure(slot.rows[0], task.index, task.stage)
            return False
        count = task.streams[0].count(task.index)
        for stream, rows, out in zip(task.streams, slot.rows, slot.out, strict=True):
            stream.operation.merge(stream.block(rows, task.index, out.view(np.uint8), F32.code))
        planned, full, base = (out[:count].astype(np.float64) for out in slot.out)
        slot.lost = float(np.square(planned - full).sum())
        slot.full = float(np.square(full - base).sum())
        return False

    def commit(self, task: Task, slot: _Slot) -> None:
        for stream in task.streams:
            self._progress.advance(stream.input_bytes(task.index))
        if task.stage is None:
            name = task.streams[0].tensor.name
            self.lost.setdefault(name, []).append(slot.lost)
            self.full.setdefault(name, []).append(slot.full)
