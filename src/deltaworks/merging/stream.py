"""One output tensor on its way: which bytes of its inputs are read, and the passes they go through."""

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.pipeline import Piece
from deltaworks.checkpoints.reader import page_aligned
from deltaworks.checkpoints.source import Source, place_in_row
from deltaworks.checkpoints.together import RowRange, read_together
from deltaworks.checkpoints.transfer import read_available, write_all
from deltaworks.checkpoints.vector import LANES
from deltaworks.checkpoints.writer import storage_error
from deltaworks.errors import CheckpointError, DeltaworksError
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.file import LayerFile
from deltaworks.layers.reading import BlockReader, LayerInput
from deltaworks.layers.source import LayerSource
from deltaworks.merging.methods.operation import LAYERED, Block, Inputs, Operation
from deltaworks.merging.owned_folder import SPOOL
from deltaworks.merging.plan import InputTensor, Plan, PlannedTensor

_PIECE_BYTES = 256 << 10
"""Reads of a device that are at least so large are worth a thread of their own."""


class Rows:
    """The buffers of one block of one tensor: a row for each input that is read there, and one for what stands in.

    Attributes:
        raw: uint8, [rows, bytes]; of the block that they are laid out for.
        stand_in: the row of the stand-in.
        holds: earlier passes left here what they read of the block.
        stays: the next pass will find here what this one reads.
    """

    def __init__(self, streams: Sequence["TensorStream"]) -> None:
        elements = max((min(s.block_size, s.elements) for s in streams), default=0)
        inputs = max((len(s.infos) for s in streams), default=1)
        rows = max((s.most_rows for s in streams), default=1)
        self._buffer: NDArray[np.uint8] = page_aligned(
            1, max((s.most_rows * s.row_bytes for s in streams), default=PAGE)
        )[0]
        self.raw: NDArray[np.uint8] = self._buffer[None]
        self.codes, self.places = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.row_of = np.zeros(inputs, np.int64)
        self.present = np.ones((inputs, -(-elements // TILE) or 1), np.bool_)
        self.scratch = np.empty((inputs + 3, TILE), np.float32)
        drawing = inputs if any(s.operation.draws_masks for s in streams) else 0
        self.masks = np.empty((drawing, 2 * -(-elements // (2 * LANES))), np.uint16)
        self.stand_in = 0
        self.holds = self.stays = False

    def lay_out(self, rows: int, row_bytes: int) -> None:
        """Cut the buffer into rows."""
        self.raw = self._buffer[: rows * row_bytes].reshape(rows, row_bytes)

    @property
    def nbytes(self) -> int:
        """Size of the buffers."""
        return self._buffer.nbytes + self.scratch.nbytes + self.masks.nbytes


class TensorStream:
    """The blocks of one planned tensor.

    Operations that need quantities of the whole tensor see its blocks more than once. Between passes, blocks stay in
    their buffers as long as there are any left. Of the others, what a budget counts is read once all the same: it waits
    in a file without a name for the passes that follow. Without a budget they are read again, which the page cache
    makes cheap.

    Args:
        plan: the plan.
        tensor: one of its tensors.
        models: the plan's models, in its order.
        block_size: elements streamed at once; more where the operation needs larger blocks.
        spool: folder for what later passes need again.
        layers: files of layers, by the places of their experts in the plan. Where the plan has no budget, all
            layers of a tensor are read instead of it.

    Raises:
        CheckpointError: a model does not hold what the plan reads.
    """

    def __init__(
        self,
        plan: Plan,
        tensor: PlannedTensor,
        models: Sequence[Model],
        block_size: int,
        spool: Path,
        layers: Mapping[int, LayerFile] | None = None,
    ) -> None:
        self.tensor, self.elements = tensor, tensor.count
        self.places = [i.model for i in tensor.inputs]
        self.infos = [_info(models[i.model], i.tensor, tensor) for i in tensor.inputs]
        self._is_expert = [plan.models[i].role != "base" for i in self.places]
        self._ranges = [
            None if r is None else [(a * plan.block_size, b * plan.block_size) for a, b in r] for r in tensor.reads
        ] or [None] * len(self.infos)
        self._stand_in = 0
        if tensor.reads and tensor.stand_in is not None:
            if tensor.stand_in in tensor.inputs:
                self._stand_in = tensor.inputs.index(tensor.stand_in)
            else:
                self._stand_in = len(self.infos)
                self.infos.append(_info(models[tensor.stand_in.model], tensor.stand_in.tensor, tensor))
                self.places.append(tensor.stand_in.model)
        whole = tensor.operation.alignment
        self.block_size = -(-block_size // whole) * whole
        self.blocks = max(1, -(-self.elements // self.block_size))
        found: dict[int, LayerInput] = {}
        if tensor.depths:
            found = self._planned_layers(layers or {})
        elif not tensor.reads:
            found = self._all_layers(plan, models, layers or {})
        # Of the inputs that come from layers, the places in what reads them.
        self._layers = {r: k for k, r in enumerate(found)}
        self._reader = BlockReader(list(found.values())) if found else None
        self._whole = [r for r, ranges in enumerate(self._ranges) if ranges is None]
        self._is_whole = np.array([ranges is None for ranges in self._ranges])
        self._by_block: dict[int, list[tuple[int, int, int]]] | None = None
        self._places = [place_in_row(t) for t in self.infos]
        self._first = np.array([p * 8 // t.dtype.bits for p, t in zip(self._places, self.infos, strict=True)])
        self._codes = np.array([t.dtype.code for t in self.infos])
        for r in self._layers:
            self._codes[r] += LAYERED
            self._first[r] = 0
        self._element_bytes = sum(t.dtype.bits for t in self.infos) / 8
        self.operation: Operation = tensor.operation.without(
            [r for r, ranges in enumerate(self._ranges) if ranges == []]
        )
        self.passes = self.operation.passes
        # Only the first of several passes may pass over an input; whatever follows sees all.
        self._seen_first = [self.passes > 0 and self.operation.sees(k) for k in range(len(tensor.inputs))]
        self._looked_at: Sequence[int] | None = None
        self._most_rows: int | None = None
        self._spools = plan.budget_bytes is not None
        self._settled = [threading.Event() for _ in range(self.passes)]
        self._parts: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._spool_folder, self._spool_fd = spool, -1

    def _planned_layers(self, layers: Mapping[int, LayerFile]) -> dict[int, LayerInput]:
        """Which layers of which inputs the plan reads."""
        found = {}
        for r, runs in enumerate(self.tensor.depths):
            if runs is not None:
                place, name = self.tensor.inputs[r]
                depths = np.zeros(self.blocks, np.int64)
                for a, b, depth in runs:
                    depths[a:b] = depth
                found[r] = LayerInput(layers[place], layers[place].tensors[name], depths)
        return found

    def _all_layers(
        self, plan: Plan, models: Sequence[Model], layers: Mapping[int, LayerFile]
    ) -> dict[int, LayerInput]:
        """All layers of the inputs that come from layers; what those are layers over becomes the stand-in."""
        found, bases = {}, set()
        every = np.full(self.blocks, DEPTH)
        for r, (place, name) in enumerate(self.tensor.inputs):
            file, base = layers.get(place), plan.models[place].base
            tensor = file.tensors.get(name) if file else None
            if file and tensor and tensor.is_delta and file.block_size == self.block_size and base is not None:
                found[r] = LayerInput(file, tensor, every)
                bases.add(InputTensor(base, name))
        if len(bases) != 1:
            return {}
        (stand_in,) = bases
        if stand_in in self.tensor.inputs:
            self._stand_in = self.tensor.inputs.index(stand_in)
        else:
            self._stand_in = len(self.infos)
            self.infos.append(_info(models[stand_in.model], stand_in.tensor, self.tensor))
            self.places.append(stand_in.model)
        return found

    @property
    def row_bytes(self) -> int:
        """What a row of a block takes, in whole pages."""
        elements, bits = min(self.block_size, self.elements), max(t.dtype.bits for t in self.infos)
        opened = max(self._reader.opened) if self._reader else 0
        # A block begins somewhere in the first page, and is loaded in whole vectors.
        return -(-max(elements * bits // 8 + 2 * PAGE, opened) // PAGE) * PAGE

    def _opened(self, r: int) -> int:
        assert self._reader is not None
        return self._reader.opened[self._layers[r]]

    @property
    def sources(self) -> set[int]:
        """Places in the plan of the models of which weights are read as they are."""
        return {place for r, place in enumerate(self.places) if r not in self._layers}

    def count(self, index: int) -> int:
        """Elements in a block."""
        return min(self.block_size, self.elements - index * self.block_size)

    def input_bytes(self, index: int) -> int:
        """Bytes of a block over all inputs, read or not."""
        return int(self._element_bytes * self.count(index))

    @property
    def expert_bytes(self) -> int:
        """Bytes that are read of experts."""
        of_layers = self._reader.nbytes if self._reader else []
        return sum(
            of_layers[self._layers[k]]
            if k in self._layers
            else info.dtype.nbytes(self.elements if r is None else sum(min(b, self.elements) - a for a, b in r))
            for k, (info, r, is_expert) in enumerate(zip(self.infos, self._ranges, self._is_expert, strict=False))
            if is_expert
        )

    def is_settled(self, stage: int, timeout: float) -> bool:
        """Whether the passes before `stage` are through; waits for at most `timeout` seconds."""
        return stage == 0 or self._settled[stage - 1].wait(timeout)

    def fill(self, sources: Mapping[int, Source | LayerSource], rows: Rows, index: int, stage: int) -> list[Piece]:
        """Read a block of every input, as far as the plan reads it, and of the stand-in where it omits any.

        Returns:
            What is left to be read, by any thread: large parts around the page cache, which take long.
        """
        start, count = index * self.block_size, self.count(index)
        parts, held = self._parts_of(index), self._held(index)
        n = len(held)
        rows.lay_out(max(1, n), self.row_bytes)
        rows.codes[:n], rows.places[:n] = self._codes[held], self._first[held]
        rows.stand_in = held.index(self._stand_in) if self._stand_in in held else 0
        rows.row_of[:] = rows.stand_in
        rows.row_of[held] = range(n)
        rows.present[: len(self._ranges)] = self._is_whole[:, None]
        wanted = []
        for r, a, b in parts:
            rows.present[r, (a - start) // TILE : -(-(b - start) // TILE)] = True
            place = self._places[r] + self.infos[r].dtype.nbytes(a - start)
            wanted.append(_Part(r, place, a, b - a))
        whole = (r for r in held if r >= len(self._ranges) or self._is_whole[r])
        wanted.extend(_Part(r, self._places[r], start, count) for r in whole)
        left = self._read(sources, rows, wanted, stage)
        if self._layers:
            self._open_layers(rows, index, [r for r in held if r in self._layers], stage)
        return left

    def _held(self, index: int) -> list[int]:
        """The inputs of which anything is read of a block, and what stands in for others: one row each, in order."""
        parts = self._parts_of(index)
        found = {*self._whole, *(r for r, _, _ in parts)}
        if self._stand_in >= len(self._ranges):
            count = self.count(index)
            read = count * len(self._whole) + sum(b - a for _, a, b in parts)
            if self._layers or read < count * len(self._ranges):
                found.add(self._stand_in)
        return sorted(found)

    @property
    def most_rows(self) -> int:
        """The most rows that a block needs."""
        if self._most_rows is None:
            self._most_rows = max(map(len, map(self._held, range(self.blocks))))
        return self._most_rows

    def looked_at(self, stage: int) -> Sequence[int]:
        """The blocks that a pass looks at; see `Operation.measures_deltas`. One at least, so that every pass ends."""
        if stage > 0 or not self.operation.measures_deltas or self._stand_in:
            return range(self.blocks)
        if self._looked_at is None:
            whole = any(self._is_expert[r] and self._seen_first[r] for r in self._whole)
            seen = (any(self._seen_first[r] for r, _, _ in self._parts_of(i)) for i in range(self.blocks))
            self._looked_at = range(self.blocks) if whole else [i for i, is_seen in enumerate(seen) if is_seen] or [0]
        return self._looked_at

    def _parts_of(self, index: int) -> list[tuple[int, int, int]]:
        """What is read of a block of inputs not read whole: which input, first element, the one after the last."""
        with self._lock:
            if self._by_block is None:
                self._by_block = {}
                for r, ranges in enumerate(self._ranges):
                    for a, b in ranges or ():
                        for block in range(a // self.block_size, -(-min(b, self.elements) // self.block_size)):
                            start = block * self.block_size
                            part = r, max(a, start), min(b, start + self.block_size, self.elements)
                            self._by_block.setdefault(block, []).append(part)
            return self._by_block.get(index, [])

    def _read(
        self, sources: Mapping[int, Source | LayerSource], rows: Rows, wanted: Sequence["_Part"], stage: int
    ) -> list[Piece]:
        """Bring what is wanted of a block to its rows, but for the pieces that are returned."""
        together, kept, left = [], [], list[Piece]()
        for r, place, first, count in wanted:
            use = self._use(r, stage)
            if r in self._layers or not use.is_wanted or (use.is_again and rows.holds):
                continue
            info, source, row = self.infos[r], sources[self.places[r]], int(rows.row_of[r])
            nbytes = info.dtype.nbytes(count)
            if use.is_again and use.spools:
                self._take_back(rows.raw[row, place : place + nbytes], r, first)
                continue
            keeps = use.spools and not rows.stays
            # What is read again had better be in the page cache by then.
            for_cache = use.comes_again and not rows.stays and not use.spools
            if isinstance(source, LayerSource) or (source.reader(info).goes_direct and not for_cache):
                read = partial(source.read_row, info, first, count, rows.raw[row], place)
                if keeps or nbytes < _PIECE_BYTES:
                    read()
                else:
                    left.append(read)
            else:
                offset = info.offset + info.dtype.nbytes(first)
                together.append(RowRange(source.reader(info), offset, nbytes, row, place))
            if keeps:
                kept.append((rows.raw[row, place : place + nbytes], r, first))
        read_together(together, rows.raw)
        for filled, r, first in kept:
            self._keep(filled, r, first)
        if left:
            left.pop()()
        return left

    def _open_layers(self, rows: Rows, index: int, inputs: Sequence[int], stage: int) -> None:
        """Bring the opened layers of a block of some inputs to their rows."""
        assert self._reader is not None
        first, wanted = index * self.block_size, []
        for r in inputs:
            use = self._use(r, stage)
            if not use.is_wanted or (use.is_again and rows.holds):
                continue
            if use.is_again and use.spools:
                self._take_back(self._opened_row(rows, r), r, first)
            else:
                wanted.append(r)
        if wanted:
            self._reader.open(index, [self._layers[r] for r in wanted], rows.raw, rows.row_of[wanted])
        for r in wanted:
            if self._use(r, stage).spools and not rows.stays:
                self._keep(self._opened_row(rows, r), r, first)

    def _opened_row(self, rows: Rows, r: int) -> NDArray[np.uint8]:
        return rows.raw[rows.row_of[r], : self._opened(r)]

    def _use(self, r: int, stage: int) -> "_Use":
        is_input = r < len(self._seen_first)
        is_wanted = not is_input or stage > 0 or not self.passes or self._seen_first[r]
        # An expert is read by the first pass that sees it; will another?
        first_read = 0 if not self.passes or not is_input or self._seen_first[r] else 1
        comes_again = first_read < self.passes
        spools = comes_again and self._spools and is_input and self._is_expert[r]
        return _Use(is_wanted, stage > first_read, comes_again, spools)

    def _keep(self, part: NDArray[np.uint8], r: int, first: int) -> None:
        """Put aside what later passes need.

        Raises:
            DeltaworksError: the spool file cannot be written.
        """
        try:
            write_all(self._spool(), part.data, self._spool_place(r, first))
        except OSError as error:
            raise storage_error(self._spool_folder, error) from error

    def _take_back(self, part: NDArray[np.uint8], r: int, first: int) -> None:
        """Fill `part` with what an earlier pass put aside.

        Raises:
            DeltaworksError: the spool file cannot be read, or lacks some of it.
        """
        try:
            got = read_available(self._spool(), part.data, self._spool_place(r, first))
        except OSError as error:
            raise DeltaworksError(f"cannot read a spool file in {self._spool_folder}: {error.strerror}") from error
        if got < len(part):
            raise DeltaworksError(
                f"a spool file in {self._spool_folder} lacks {len(part) - got:,} of {len(part):,} bytes that were"
                " written to it; check that device, and run the same command again"
            )

    def _spool(self) -> int:
        with self._lock:
            if self._spool_fd < 0:
                with tempfile.TemporaryFile(prefix=SPOOL, dir=self._spool_folder) as file:
                    self._spool_fd = os.dup(file.fileno())
            return self._spool_fd

    def _spool_place(self, row: int, element: int) -> int:
        start = sum(self._spool_bytes(r) for r in range(row))
        if row in self._layers:
            return start + element // self.block_size * self._opened(row)
        return start + self.infos[row].dtype.nbytes(element)

    def _spool_bytes(self, r: int) -> int:
        return self.blocks * self._opened(r) if r in self._layers else self.infos[r].dtype.nbytes(self.elements)

    def block(self, rows: Rows, index: int, out: NDArray[np.uint8], out_code: int) -> Block:
        """A filled block as operations take it."""
        n, inputs = len(rows.raw), len(self.tensor.inputs)
        return Block(
            Inputs(
                rows.raw,
                rows.codes[:n],
                rows.places[:n],
                rows.row_of[:inputs],
                rows.present[:inputs],
                rows.stand_in,
            ),
            index * self.block_size,
            self.count(index),
            rows.scratch,
            out,
            out_code,
            rows.masks,
            rows.holds,
        )

    def measure(self, rows: Rows, index: int, stage: int) -> None:
        """Take from a filled block what a pass is for; the last block of the pass settles the operation."""
        part = self.operation.measure(self.block(rows, index, rows.raw[0], 0))
        awaited = len(self.looked_at(stage))
        with self._lock:
            self._parts[index] = part
            is_last = len(self._parts) == awaited
        if is_last:
            self._settle(stage)

    def _settle(self, stage: int) -> None:
        parts = [
            self._parts[i] if i in self._parts else self.operation.unread(self.count(i)) for i in range(self.blocks)
        ]
        self._parts = {}
        self.operation = self.operation.settle(parts, self.block_size)
        self._settled[stage].set()

    def close(self) -> None:
        """Give up what was kept for later passes."""
        if self._spool_fd >= 0:
            os.close(self._spool_fd)
            self._spool_fd = -1


class _Part(NamedTuple):
    """A part of a block of an input.

    Attributes:
        input: which.
        place: byte of its row.
        first: element of the tensor.
        elements: how many.
    """

    input: int
    place: int
    first: int
    elements: int


class _Use(NamedTuple):
    """What a pass does with an input.

    Attributes:
        is_wanted: whether it looks at it.
        is_again: whether an earlier pass did.
        comes_again: whether more than one pass does.
        spools: whether what is read waits in a file for the next.
    """

    is_wanted: bool
    is_again: bool
    comes_again: bool
    spools: bool


def _info(model: Model, name: str, tensor: PlannedTensor) -> TensorInfo:
    info = model.checkpoint.find(name)
    if info is None or info.shape != tensor.shape:
        raise CheckpointError(f"{model.name} no longer holds the tensor {name!r} that the plan reads")
    return info
