"""What threads take up one by one: a block to be measured in a pass, or to be merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from deltaworks.checkpoints.pipeline import Piece
from deltaworks.checkpoints.source import Source
from deltaworks.layers.source import LayerSource
from deltaworks.merging.stream import Rows, TensorStream


@dataclass(frozen=True, slots=True)
class Task:
    """A block to be measured in pass `stage` of its one stream, or merged in all its streams at once."""

    streams: tuple[TensorStream, ...]
    index: int
    stage: int | None

    def is_ready(self, timeout: float) -> bool:
        """Whether the passes before this one are through; waits for at most `timeout` seconds a stream."""
        return all(s.is_settled(s.passes if self.stage is None else self.stage, timeout) for s in self.streams)

    def fill(self, sources: Mapping[int, Source | LayerSource], rows: Sequence[Rows]) -> list[Piece]:
        """Read the block of every stream; what is returned is left to be read, by any thread."""
        left = []
        for stream, own in zip(self.streams, rows, strict=False):
            left += stream.fill(sources, own, self.index, stream.passes if self.stage is None else self.stage)
        return left


def in_order(groups: Sequence[tuple[TensorStream, ...]]) -> Iterator[Task]:
    """Blocks in the order of the output; between those of a tensor come the passes of the next.

    So nobody waits for passes, and what stays in memory between them is about a tensor's blocks.
    """
    yield from (task for group in groups[:1] for task in _passes(group))
    for i, group in enumerate(groups):
        merged = (Task(group, index, None) for index in range(group[0].blocks))
        ahead = (task for following in groups[i + 1 : i + 2] for task in _passes(following))
        yield from (task for pair in zip_longest(ahead, merged) for task in pair if task)


def _passes(group: tuple[TensorStream, ...]) -> Iterator[Task]:
    return (Task((s,), index, stage) for s in group for stage in range(s.passes) for index in s.looked_at(stage))


def bytes_to_handle(streams: Sequence[TensorStream]) -> int:
    """Input bytes of all tasks, read or not: what progress is told of."""
    merged = (s.input_bytes(i) for s in streams for i in range(s.blocks))
    measured = (s.input_bytes(i) for s in streams for stage in range(s.passes) for i in s.looked_at(stage))
    return sum(merged) + sum(measured)
