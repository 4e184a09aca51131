"""Which adapters a GPU serves, and the part of a workload that then reaches it.

A hot adapter may be served by several GPUs, each of which takes an interval of its requests: the intervals of all
pieces of an adapter cover [0, 1) once, so every request reaches exactly one GPU.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.serving.workload import Adapter, Workload

GOLDEN = 0.6180339887498949
"""The golden ratio's fractional part: its multiples modulo 1 are evenly spread, however many are taken."""


class Piece(NamedTuple):
    """An adapter on a GPU, or a share of its requests.

    Attributes:
        adapter: Its place in the workload.
        share: Of its requests, in (0, 1].
        start: Where its interval of the requests begins, in [0, 1).
    """

    adapter: int
    share: float = 1.0
    start: float = 0.0


Part = tuple[Piece, ...]
"""What one GPU serves, in order of the adapters."""


def part_of(workload: Workload, part: Part, traffic: float = 1.0) -> Workload:
    """The part of a workload that a GPU serves.

    Args:
        workload: The whole.
        part: The GPU's adapters. A piece that starts at 1 or later stands for another adapter just like it.
        traffic: How many times the traffic; a trace then comes in less time. Its requests for the base model itself are
            left out. Notes on how the whole was read are left out as well.
    """
    adapters = tuple(_adapter(workload.adapters[piece.adapter], piece, traffic) for piece in part)
    if workload.trace is None:
        return replace(workload, adapters=adapters, notes=())
    trace, duration_s = workload.trace, workload.duration_s
    nothing = np.empty(0, np.int64)
    chosen, shift, named = [], [], []
    for piece, adapter in zip(part, adapters, strict=True):
        own = trace.by_adapter.get(workload.adapters[piece.adapter].name, nothing)
        own = own[trace.arrival_s[own] < duration_s]
        own = own[_interval(own.size, piece.start % 1.0, piece.share)]
        chosen.append(own)
        shift.append(np.full(own.size, (int(piece.start) * GOLDEN) % 1.0 * duration_s))
        named += [adapter.name] * own.size
    places = np.concatenate([nothing, *chosen])
    arrival_s = (trace.arrival_s[places] + np.concatenate([np.empty(0), *shift])) % duration_s
    order = np.argsort(arrival_s, kind="stable")
    thinned = replace(
        trace, arrival_s=arrival_s[order] / traffic, prompt=trace.prompt[places[order]],
        output=trace.output[places[order]], adapter=tuple(named[i] for i in order),
    )  # fmt: skip
    return replace(workload, adapters=adapters, trace=thinned, duration_s=duration_s / traffic, notes=())


def _interval(count: int, start: float, share: float) -> NDArray[np.bool_]:
    """Which of an adapter's requests lie in an interval, (count,) bool.

    The golden ratio's multiples spread every stretch of the requests evenly over all intervals.
    """
    place = (np.arange(1, count + 1) * GOLDEN) % 1.0
    return np.asarray((place >= start) & (place < start + share))


def _adapter(adapter: Adapter, piece: Piece, traffic: float) -> Adapter:
    start = piece.start % 1.0
    name = adapter.name if piece.start < 1 else f"{adapter.name}~{int(piece.start)}"
    rate = adapter.rate if traffic == 1.0 else tuple([(since, rate * traffic) for since, rate in adapter.rate])
    # Rounding must not cost the last piece of an adapter a request.
    end = start + piece.share
    # Not `replace`, which takes several times as long: there may be 100,000 adapters, and many parts.
    return Adapter(
        name, adapter.rank, rate, adapter.burstiness, adapter.lengths, (start, 1.0 if end > 1.0 - 1e-12 else end)
    )


def cut(shares: Iterable[tuple[int, int, float]], gpus: int) -> list[Part]:
    """Parts from ``(GPU, adapter, share)``: each adapter's pieces get intervals, one after another, that cover [0, 1).

    The last piece of an adapter takes what rounding left.
    """
    listed = sorted(shares, key=lambda s: (s[1], s[0]))
    parts: list[list[Piece]] = [[] for _ in range(gpus)]
    end = 0.0
    for i, (gpu, adapter, share) in enumerate(listed):
        first = i == 0 or listed[i - 1][1] != adapter
        start = 0.0 if first else end
        last = i + 1 == len(listed) or listed[i + 1][1] != adapter
        end = 1.0 if last else start + share
        parts[gpu].append(Piece(adapter, end - start, start))
    return [tuple(part) for part in parts]
