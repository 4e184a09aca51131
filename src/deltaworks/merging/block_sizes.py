"""How many elements of a tensor are streamed at once."""

from collections import Counter

from deltaworks.catalog.statistics import DEFAULT_BLOCK_SIZE, LARGEST_BLOCK, check_block_size
from deltaworks.catalog.storage import ReadCost
from deltaworks.merging.plan import Plan, PlannedTensor

_INPUT_BYTES = 16 << 20
"""Of one block. Smaller ones cost more in turns of Python and of threads than they save in misses of the cache."""

_LARGEST_USEFUL = 1 << 20
"""Elements a block; larger ones take memory and save nothing."""


def stream_block_sizes(plan: Plan, wanted: int | None) -> dict[str, int]:
    """For each tensor, the block size asked for, a power of two.

    Where none is asked for, blocks are as large as a request has to be to be worth its price, and larger as long as
    what is read for one is no more than _INPUT_BYTES.
    """
    names = [t.name for t in plan.tensors]
    if any(t.depths for t in plan.tensors):
        return dict.fromkeys(names, plan.block_size)  # layers are read in their own blocks, or not at all
    if wanted is not None:
        return dict.fromkeys(names, check_block_size(wanted))
    least = DEFAULT_BLOCK_SIZE
    worth = ReadCost(*plan.read_cost).request_bytes if plan.read_cost is not None else 0
    while least < LARGEST_BLOCK and 2 * least < worth:
        least *= 2
    return {t.name: _largest_block_size(t, plan.block_size, least) for t in plan.tensors}


def _largest_block_size(tensor: PlannedTensor, planned: int, least: int) -> int:
    """The largest block, but one of `least`, of which no more than _INPUT_BYTES is read, at two bytes an element."""
    size = least
    while size < _LARGEST_USEFUL and 4 * size * _most_read(tensor, planned, 2 * size) <= _INPUT_BYTES:
        size *= 2
    return size


def _most_read(tensor: PlannedTensor, planned: int, size: int) -> int:
    """Of how many inputs, at most, anything is read of one block of `size`; reads are of `planned` blocks."""
    if not tensor.reads:
        return len(tensor.inputs)
    counts: Counter[int] = Counter()
    for ranges in tensor.reads:
        counts.update({i for a, b in ranges or () for i in range(a * planned // size, -(-b * planned // size))})
    others = tensor.stand_in is not None and tensor.stand_in not in tensor.inputs
    return sum(r is None for r in tensor.reads) + max(counts.values(), default=0) + others
