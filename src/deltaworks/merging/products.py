"""Inner products of the rows of matrices, for planning.

A library of linear algebra gives other bits on every machine, so that plans would differ. And its threads wait for each
other at work, which on a machine that has other things to do takes a hundred times as long as the work.
"""

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.vector import LANES, splat, sum_in_order, widen

_CACHED = 1024
"""Columns that are multiplied at once: those of a hundred rows stay in a cache."""


def inner_products(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of every row of a matrix with every other: float64, [..., rows, rows].

    Args:
        rows: float32, [..., rows, size]; one or many matrices, their size a multiple of LANES.
    """
    *many, count, size = rows.shape
    products = np.empty((*many, count, count))
    for_each = np.ascontiguousarray(rows).reshape(-1, size), products.reshape(-1, count)
    _multiply(*for_each, count)
    return products


@kernel
def _multiply(rows: NDArray[np.float32], out: NDArray[np.float64], count: int) -> None:
    """See `inner_products`; every `count` rows are a matrix."""
    size = rows.shape[1]
    out[:] = 0.0
    for first in range(0, len(rows), count):
        for start in range(0, size, _CACHED):
            end = min(size, start + _CACHED)
            for i in range(count):
                own = out[first + i]
                for j in range(0, i + 1, 4):
                    # Where there are less than four left, the last is multiplied more than once.
                    second, third, fourth = min(j + 1, i), min(j + 2, i), min(j + 3, i)
                    a = b = c = d = splat(np.float32(0.0))
                    for k in range(start, end, LANES):
                        x = load(rows, first + i, k)
                        a, b = a + x * load(rows, first + j, k), b + x * load(rows, first + second, k)
                        c, d = c + x * load(rows, first + third, k), d + x * load(rows, first + fourth, k)
                    own[j] += sum_in_order(widen(a))
                    if second > j:
                        own[second] += sum_in_order(widen(b))
                    if third > second:
                        own[third] += sum_in_order(widen(c))
                    if fourth > third:
                        own[fourth] += sum_in_order(widen(d))
        for i in range(count):
            for j in range(i):
                out[first + j, i] = out[first + i, j]
