"""Weighted sums of models: linear averaging, and the scaled copy of one model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, encode
from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.vector import LANES, ZERO, fma, fma_reference, splat
from deltaworks.merging.methods.operation import Block, Inputs, Operation, find_rows, stage, stage_stand_in, sum_to_zero


@dataclass(frozen=True, slots=True)
class WeightedSum(Operation):
    """The sum of ``weight * input``, divided by the sum of the weights where `normalize` is set.

    Model soups (arXiv 2203.05482), with `normalize`. Sums run in float32 in the order of the inputs, each product
    rounded together with its addition, which is both closer and what PyTorch does.
    """

    kind: ClassVar[str] = "weighted"

    weights: tuple[float, ...]
    normalize: bool

    def depends_on(self, k: int) -> bool:
        """An input of weight 0 counts for nothing."""
        return self.weights[k] != 0

    def cancels(self, inputs: Sequence[int]) -> bool:
        """Their weights sum to 0."""
        return sum_to_zero([self.weights[k] for k in inputs])

    @property
    def is_zero(self) -> bool:
        """All weights are 0."""
        return not any(self.weights)

    @property
    def keeps_equal_inputs(self) -> bool:
        """The weights sum to the divisor."""
        return math.isclose(sum(self.weights) / self.divisor, 1.0)

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        weights = np.array(self.weights, np.float32)
        return weighted_sum(block.inputs, block.count, weights, self.divisor, block.scratch, block.out, block.out_code)

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same with NumPy."""
        total = np.zeros_like(inputs[0])
        for weight, values in zip(self.weights, inputs, strict=True):
            total = fma_reference(np.float32(weight), values, total)
        divisor = self.divisor
        return total if divisor == 1 else total / divisor

    @property
    def divisor(self) -> np.float32:
        """The sum of the weights where they are normalized, else one."""
        total = np.float32(0.0)
        for weight in self.weights:
            total += np.float32(weight)
        return total if self.normalize else np.float32(1.0)

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        return {"weights": list(self.weights), "normalize": self.normalize}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(tuple(content["weights"]), content["normalize"])


@kernel
def weighted_sum(
    inputs: Inputs,
    count: int,
    weights: NDArray[np.float32],
    divisor: np.float32,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Sum the inputs, each times its weight, and divide; see `Block` for the arguments."""
    wrong = 0
    models = len(weights)
    halves, total = inputs.rows.view(np.uint16), scratch[models + 1]
    rows, places = np.empty(models + 1, np.int64), np.empty(models + 1, np.int64)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        half = find_rows(inputs, start // TILE, rows[:models])
        rows[models] = inputs.stand_in
        if half and n % LANES == 0:
            for k in range(models + 1):
                places[k] = inputs.places[rows[k]] + start
            _sum_tile(halves, rows, places, n, weights, divisor, total)
        else:
            below = scratch[len(scratch) - 1 :]
            stage_stand_in(inputs, start, n, below)
            for k in range(models + 1):
                if k == models or rows[k] != inputs.stand_in:
                    stage(inputs, rows[k], start, n, scratch[k], below)
                    rows[k] = k
                else:
                    rows[k] = models
                places[k] = 0
            _sum_tile(scratch, rows, places, n, weights, divisor, total)
        wrong += encode(total, n, out_code, out, start)
    return wrong


@inner
def _sum_tile(
    table: NDArray[Any],
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    n: int,
    weights: NDArray[np.float32],
    divisor: np.float32,
    out: NDArray[np.float32],
) -> None:
    """The weighted sum of `n` elements, from `places` on in `rows` of a table that `load` takes.

    The last of `rows` is the stand-in's, which is loaded once for all the inputs that it stands in for.
    """
    parts, models = splat(divisor), len(weights)
    other, other_place = rows[models], places[models]
    whole = n - n % (4 * LANES)
    # Each addition waits for the one before it, so four sums go side by side.
    for i in range(0, whole, 4 * LANES):
        a = b = c = d = splat(ZERO)
        place = other_place + i
        other_a, other_b = load(table, other, place), load(table, other, place + LANES)
        other_c, other_d = load(table, other, place + 2 * LANES), load(table, other, place + 3 * LANES)
        for k in range(models):
            weight, row, place = splat(weights[k]), rows[k], places[k] + i
            if row == other:
                a, b = fma(weight, other_a, a), fma(weight, other_b, b)
                c, d = fma(weight, other_c, c), fma(weight, other_d, d)
            else:
                a = fma(weight, load(table, row, place), a)
                b = fma(weight, load(table, row, place + LANES), b)
                c = fma(weight, load(table, row, place + 2 * LANES), c)
                d = fma(weight, load(table, row, place + 3 * LANES), d)
        store(out, i, a / parts)
        store(out, i + LANES, b / parts)
        store(out, i + 2 * LANES, c / parts)
        store(out, i + 3 * LANES, d / parts)
    for i in range(whole, n, LANES):
        a = splat(ZERO)
        for k in range(models):
            a = fma(splat(weights[k]), load(table, rows[k], places[k] + i), a)
        store(out, i, a / parts)
