"""Spherical linear interpolation between two models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, encode
from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.vector import LANES, narrow, splat, sum_in_order, widen
from deltaworks.merging.methods.exact_sum import exact_sums
from deltaworks.merging.methods.operation import (
    Block,
    Inputs,
    Operation,
    find_rows,
    stage,
    stage_stand_in,
    tile_sum_reference,
)

NEARLY_PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class Slerp(Operation):
    """Interpolate along the great circle between two tensors; `t` = 0 is the first input, 1 the second.

    Tensors that are nearly parallel (cosine beyond 0.9995 either way) are interpolated in a straight line. Norms and
    the inner product are those of the whole tensor; sums and products are float64, rounded to float32 at the end.
    Shoemake, SIGGRAPH 1985, with mergekit's thresholds.

    Attributes:
        t: where to stop on the way.
        coefficients: what each input is multiplied by, once the tensor's sums are known.
    """

    kind: ClassVar[str] = "slerp"

    t: float
    coefficients: tuple[float, float] | None = None

    def depends_on(self, k: int) -> bool:
        """Either end of the way is one of the inputs."""
        return self.t != (0 if k else 1)

    @property
    def passes(self) -> int:
        """One, for the norms and the inner product."""
        return 1 if self.coefficients is None else 0

    def measure(self, block: Block) -> NDArray[np.float64]:
        """Partial sums of a block: first squared, second squared, inner product; [tiles, 3]."""
        sums = np.empty((-(-block.count // TILE), 3), np.float64)
        inner_products(block.inputs, block.count, block.scratch, sums)
        return sums

    def settle(self, parts: Sequence[NDArray[np.float64]], block_size: int) -> Self:
        """This operation with its coefficients."""
        del block_size
        first, second, product = exact_sums(parts)
        return replace(self, coefficients=slerp_coefficients(self.t, first, second, product))

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        assert self.coefficients is not None
        return blend(block.inputs, block.count, *self.coefficients, block.scratch, block.out, block.out_code)

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same with NumPy."""
        a, b = (x.astype(np.float64) for x in inputs)
        sums = (tile_sum_reference(a * a), tile_sum_reference(b * b), tile_sum_reference(a * b))
        first, second = slerp_coefficients(self.t, *sums)
        blended: NDArray[np.float32] = (first * a + second * b).astype(np.float32)
        return blended

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        return {"t": self.t}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(content["t"])


def slerp_coefficients(t: float, first: float, second: float, product: float) -> tuple[float, float]:
    """What each input is multiplied by, from both squared norms and the inner product."""
    norms = (n if n > SMALLEST_NORM else 1.0 for n in (math.sqrt(first), math.sqrt(second)))
    cosine = min(1.0, max(-1.0, product / math.prod(norms)))
    if abs(cosine) > NEARLY_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@kernel
def blend(
    inputs: Inputs,
    count: int,
    first: float,
    second: float,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """The first input times `first` plus the second times `second`; see `Block` for the other arguments."""
    wrong = 0
    rows = np.empty(2, np.int64)
    total = scratch[2]
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        find_rows(inputs, start // TILE, rows)
        below = scratch[len(scratch) - 1 :]
        stage_stand_in(inputs, start, n, below)
        stage(inputs, rows[0], start, n, scratch[0], below)
        stage(inputs, rows[1], start, n, scratch[1], below)
        for i in range(0, n, LANES):
            a, b = widen(load(scratch, 0, i)), widen(load(scratch, 1, i))
            store(total, i, narrow(splat(first) * a + splat(second) * b))
        wrong += encode(total, n, out_code, out, start)
    return wrong


@kernel
def inner_products(inputs: Inputs, count: int, scratch: NDArray[np.float32], sums: NDArray[np.float64]) -> None:
    """Per tile: the first input squared, the second squared, their product, summed."""
    rows = np.empty(2, np.int64)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        find_rows(inputs, start // TILE, rows)
        below = scratch[len(scratch) - 1 :]
        stage_stand_in(inputs, start, n, below)
        stage(inputs, rows[0], start, n, scratch[0], below)
        stage(inputs, rows[1], start, n, scratch[1], below)
        first, second, product = splat(0.0), splat(0.0), splat(0.0)
        for i in range(0, n, LANES):
            a, b = widen(load(scratch, 0, i)), widen(load(scratch, 1, i))
            first = first + a * a
            second = second + b * b
            product = product + a * b
        tile = start // TILE
        sums[tile, 0], sums[tile, 1] = sum_in_order(first), sum_in_order(second)
        sums[tile, 2] = sum_in_order(product)
