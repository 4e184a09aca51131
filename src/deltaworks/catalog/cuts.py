"""Exact trim cuts, from statistics alone where they suffice, else from one look at a sliver of the data."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.analyze import delta_tensors
from deltaworks.catalog.histogram import Cut, Interval, place_cut, place_ties
from deltaworks.catalog.models import Model
from deltaworks.catalog.statistics import TensorStatistics, read_statistics
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import TILE, decode
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.errors import CatalogError
from deltaworks.progress import Progress, Silent


def find_cuts(
    catalog: Catalog,
    expert: Model,
    base: Model,
    wanted: Iterable[tuple[str, int]],
    progress: Progress | None = None,
) -> dict[tuple[str, int], Cut]:
    """Where trims of the delta `expert` minus `base` fall.

    A cut that falls on one magnitude is known from the statistics. One that falls between two bfloat16 numbers needs
    the blocks that hold magnitudes in between; it is read once and then remembered.

    Args:
        catalog: must hold the analysis of this delta.
        expert: the fine-tuned model; its files must be unchanged.
        base: the model it was tuned from; likewise.
        wanted: tensors, each with the number of elements to keep.
        progress: told of the bytes read again, where any are.

    Returns:
        The cut for each of `wanted`.

    Raises:
        CatalogError: the delta is not analyzed.
    """
    cuts = {key: Cut(*found) for key, found in catalog.find_cuts(expert.fingerprint, base.fingerprint).items()}
    missing: dict[str, list[int]] = {}
    keys = list(wanted)
    for tensor, keep in keys:
        if (tensor, keep) not in cuts:
            missing.setdefault(tensor, []).append(keep)
    if missing:
        found = catalog.find_analysis(expert.fingerprint, base.fingerprint)
        if found is None:
            raise CatalogError(
                f"{expert.name} is not analyzed against {base.name}; run: deltaworks analyze {expert.name}"
            )
        new = _place(expert, base, read_statistics(found[1]), missing, progress or Silent())
        catalog.save_cuts(expert.fingerprint, base.fingerprint, dict(new))
        cuts |= new
    return {key: cuts[key] for key in keys}


def _place(
    expert: Model, base: Model, statistics: Iterable[TensorStatistics], wanted: dict[str, list[int]], progress: Progress
) -> dict[tuple[str, int], Cut]:
    cuts: dict[tuple[str, int], Cut] = {}
    open_cuts: list[tuple[TensorStatistics, int, Interval]] = []
    for tensor in statistics:
        blocks = [b.histogram for b in tensor.blocks]
        for keep in wanted.get(tensor.name, ()):
            cut = place_cut(tensor.total, blocks, tensor.block_size, tensor.elements, keep)
            if isinstance(cut, Interval):
                open_cuts.append((tensor, keep, cut))
            else:
                cuts[tensor.name, keep] = cut
    if open_cuts:
        pairs = {e.name: (b, e) for b, e in delta_tensors(expert, base)}
        counter = ByteCounter()
        progress.start(f"refine trims of {expert.name}", sum(_sliver(pairs[t.name], t, i) for t, _, i in open_cuts))
        with Source(base, counter) as base_source, Source(expert, counter) as expert_source:
            for tensor, keep, interval in open_cuts:
                pair = pairs[tensor.name]
                cuts[tensor.name, keep] = _refine(base_source, expert_source, pair, tensor, interval)
                progress.advance(_sliver(pair, tensor, interval))
        progress.finish()
    return cuts


def _sliver(pair: tuple[TensorInfo, TensorInfo], tensor: TensorStatistics, interval: Interval) -> int:
    return sum(t.dtype.nbytes(b.elements) for t in pair for b in tensor.blocks if b.histogram.count_of(interval.bin))


def _refine(
    base_source: Source,
    expert_source: Source,
    pair: tuple[TensorInfo, TensorInfo],
    tensor: TensorStatistics,
    interval: Interval,
) -> Cut:
    base, expert = pair
    size = tensor.block_size
    buffers = [np.empty(size * t.dtype.bits // 8, np.uint8) for t in pair]
    scratch = np.empty((2, TILE), np.float32)
    found: list[NDArray[np.uint16]] = []
    for i, block in enumerate(tensor.blocks):
        count = block.histogram.count_of(interval.bin)
        inside = np.empty(count, np.uint16)
        if count:
            base_source.read(base, i * size, block.elements, buffers[0])
            expert_source.read(expert, i * size, block.elements, buffers[1])
            collect_lower_bits(
                buffers[0],
                base.dtype.code,
                buffers[1],
                expert.dtype.code,
                block.elements,
                interval.bin >> 1,
                scratch,
                inside,
            )
        found.append(inside)
    descending = np.sort(np.concatenate(found))[::-1]
    lower = int(descending[interval.rank - 1])
    threshold = (interval.bin >> 1 << 16) | lower
    above = int(np.searchsorted(-descending.astype(np.int32), -lower))
    equals = [int(np.count_nonzero(f == lower)) for f in found]
    if sum(equals) == interval.rank - above:
        return Cut(threshold, tensor.elements, 0, 1)
    return place_ties(threshold, equals, size, interval.rank - above)


def lower_bits_reference(base: NDArray[np.float32], expert: NDArray[np.float32], upper: int) -> NDArray[np.uint16]:
    """What `collect_lower_bits` collects of a block (both flat), with NumPy."""
    magnitudes = np.abs(expert - base).view(np.uint32)
    inside = (magnitudes >> 16 == upper) & (magnitudes & 0xFFFF != 0)
    lower: NDArray[np.uint16] = (magnitudes[inside] & 0xFFFF).astype(np.uint16)
    return lower


@kernel
def collect_lower_bits(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    count: int,
    upper: int,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint16],
) -> None:
    """The lower 16 bits, not zero, of every magnitude in a block whose upper 16 bits are `upper`, in order."""
    b, d = scratch[0], scratch[1]
    bits = d.view(np.uint32)
    found = 0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(base, base_code, start, n, b)
        decode(expert, expert_code, start, n, d)
        for i in range(n):
            d[i] = d[i] - b[i]
        for i in range(n):
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            lower = magnitude & np.uint32(0xFFFF)
            if (magnitude >> np.uint32(16)) == np.uint32(upper) and lower != np.uint32(0):
                out[found] = np.uint16(lower)
                found += 1
