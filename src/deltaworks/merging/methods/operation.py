"""What a merge method does to one tensor: the interface that plans store and the executor drives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import kernel

LANES = 16


@dataclass(slots=True)
class Block:
    """One block of one tensor on its way through a kernel.

    Attributes:
        rows: uint8, [inputs, bytes]; the raw elements of each input, at the front of its row.
        codes: int64, [inputs]; the element type of each.
        start: flat index of the block's first element in its tensor.
        count: elements in the block.
        scratch: float32, [inputs + 3, TILE].
        out: uint8; raw elements of the output, at the front.
        out_code: element type of the output.
    """

    rows: NDArray[np.uint8]
    codes: NDArray[np.int64]
    start: int
    count: int
    scratch: NDArray[np.float32]
    out: NDArray[np.uint8]
    out_code: int


class Operation(ABC):
    """How the inputs of one tensor become one output.

    Law: `merge`, block by block, in any order and with any block size, writes exactly the bytes of `reference` on
    whole tensors, rounded once. Operations that need a quantity of the whole tensor have `passes`: in each, `measure`
    sees every block, and the next pass goes on with what `settle` makes of it.
    """

    kind: ClassVar[str]

    @property
    def passes(self) -> int:
        """How many times the tensor must stream by before it can be merged."""
        return 0

    @property
    def alignment(self) -> int:
        """Elements of which every block must be a multiple; the last block of a tensor may be shorter."""
        return 1

    def measure(self, block: Block) -> Any:
        """What this pass takes from a block."""
        raise AssertionError(f"{self.kind} takes nothing from {block}")

    def settle(self, parts: Sequence[Any], block_size: int) -> Self:
        """This operation with what a pass was for filled in, from the parts of all blocks in order."""
        raise AssertionError(f"{self.kind} has no use for {len(parts)} parts of {block_size} elements")

    @abstractmethod
    def merge(self, block: Block) -> int:
        """Fill `block.out`; returns how many signs of NaN or infinity were met, in the output or on the way to it."""

    @abstractmethod
    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same on whole flat tensors, in float32, with NumPy."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""

    @classmethod
    @abstractmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""


@kernel
def lane_sum(values: NDArray[np.float64], count: int) -> float:
    """Sum of `count` values in a fixed order: sixteen interleaved lanes, then the lanes one after another.

    The order is the same however the loop is vectorised, so sums are reproducible on every machine.
    """
    lanes = np.zeros(LANES, np.float64)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += values[i + lane]
    for i in range(whole, count):
        lanes[i - whole] += values[i]
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


def exact_sums(parts: Sequence[NDArray[np.float64]]) -> list[float]:
    """Column sums of partial sums ([tiles, columns] each), correctly rounded, so that their order cannot matter."""
    return [math.fsum(v for part in parts for v in part[:, column]) for column in range(parts[0].shape[1])]


def tile_sum_reference(values: NDArray[np.float64]) -> float:
    """The sum over a whole tensor as the kernels take it: `lane_sum` of every tile, then the tiles exactly."""
    return math.fsum(_lane_sum_reference(values[i : i + TILE]) for i in range(0, len(values), TILE))


def _lane_sum_reference(values: NDArray[np.float64]) -> float:
    lanes = np.zeros(LANES)
    for row in np.pad(values, (0, -len(values) % LANES)).reshape(-1, LANES):
        lanes += row
    total = 0.0
    for lane in lanes:
        total += float(lane)
    return total
