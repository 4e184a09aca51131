"""Weighted sums of models: linear averaging, and the scaled copy of one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, decode, encode
from deltaworks.checkpoints.jit import fma, fma_reference, kernel
from deltaworks.merging.methods.operation import Block, Operation


@dataclass(frozen=True, slots=True)
class WeightedSum(Operation):
    """The sum of ``weight * input``, divided by the sum of the weights where `normalize` is set.

    Model soups (arXiv 2203.05482), with `normalize`. Sums run in float32 in the order of the inputs, each product
    rounded together with its addition, which is both closer and what PyTorch does.
    """

    kind: ClassVar[str] = "weighted"

    weights: tuple[float, ...]
    normalize: bool

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        weights = np.array(self.weights, np.float32)
        return weighted_sum(
            block.rows, block.codes, block.count, weights, self.divisor, block.scratch, block.out, block.out_code
        )

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
    rows: NDArray[np.uint8],
    codes: NDArray[np.int64],
    count: int,
    weights: NDArray[np.float32],
    divisor: np.float32,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Sum the inputs, each times its weight, and divide; see `Block` for the arguments."""
    wrong = 0
    total, x = scratch[0], scratch[1]
    one = divisor == np.float32(1.0)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        total[:] = np.float32(0.0)
        for k in range(len(weights)):
            decode(rows[k], codes[k], start, n, x)
            w = weights[k]
            for i in range(n):
                total[i] = fma(w, x[i], total[i])
        if not one:
            for i in range(n):
                total[i] = total[i] / divisor
        wrong += encode(total, n, out_code, out, start)
    return wrong
