"""What a merge method does to one tensor: the interface that plans store and the executor drives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, decode, decode_reference, encode_reference
from deltaworks.checkpoints.dtypes import BF16, BY_CODE, DType
from deltaworks.checkpoints.jit import inner
from deltaworks.checkpoints.vector import LANES, ZERO
from deltaworks.layers.decode import decode_block, decode_tile
from deltaworks.layers.file import exact_elements

_BF16 = BF16.code

LAYERED = 16
"""Added to the code of a row's element type where the row holds an opened block of layers over the stand-in's row."""


class Inputs(NamedTuple):
    """The raw elements of one block of several models, as kernels take them.

    Attributes:
        rows: uint8, [rows, bytes]; one row for each input of which anything was read, and for the stand-in.
        codes: int64, [rows]; the element type of each; see LAYERED.
        places: int64, [rows]; the element of each row at which the block begins.
        row_of: int64, [inputs]; the row of each input; the stand-in's where nothing was read.
        present: bool, [inputs, tiles]; whether a tile of the block was read. One that was not reads as the stand-in's.
        stand_in: the row of the stand-in; any where everything was read.
    """

    rows: NDArray[np.uint8]
    codes: NDArray[np.int64]
    places: NDArray[np.int64]
    row_of: NDArray[np.int64]
    present: NDArray[np.bool_]
    stand_in: int


@dataclass(slots=True)
class Block:
    """One block of one tensor on its way through a kernel.

    Attributes:
        inputs: what was read.
        start: flat index of the block's first element in its tensor.
        count: elements in the block.
        scratch: float32, [inputs + 3, TILE].
        out: uint8, a multiple of 8 bytes; raw elements of the output, at the front.
        out_code: element type of the output.
        masks: uint16, [inputs or 0, an even number]; room for a bit an element for operations that `draws_masks`, which
            find here what an earlier pass left.
        is_again: whether an earlier pass saw the block in these very buffers.
    """

    inputs: Inputs
    start: int
    count: int
    scratch: NDArray[np.float32]
    out: NDArray[np.uint8]
    out_code: int
    masks: NDArray[np.uint16] = field(default_factory=lambda: np.empty((0, 0), np.uint16))
    is_again: bool = False

    def raw(self, k: int, bits: int) -> NDArray[np.uint8]:
        """The bytes of input `k` (uint8), whose elements have `bits`, with the stand-in's where it was not read."""
        r, other = int(self.inputs.row_of[k]), self.inputs.stand_in
        own = self._row(r, bits)
        present = np.repeat(self.inputs.present[k], TILE * bits // 8)[: len(own)]
        if present.all():
            return own
        dtype, below = self._dtype(r), self._dtype(other)
        stand_in = self._row(other, below.bits if below else bits)
        if dtype and below and below is not dtype:
            stand_in = encode_reference(decode_reference(stand_in, below), dtype)
        return np.where(present, own, stand_in)

    def dtype(self, k: int) -> DType | None:
        """The element type of input `k`, or of the stand-in where nothing of it was read; None for integers."""
        return self._dtype(int(self.inputs.row_of[k]))

    def _dtype(self, r: int) -> DType | None:
        return BY_CODE.get(int(self.inputs.codes[r]) % LAYERED)

    def _row(self, r: int, bits: int) -> NDArray[np.uint8]:
        dtype, base = self._dtype(r), self._dtype(self.inputs.stand_in)
        if self.inputs.codes[r] >= LAYERED and dtype and base:
            values = np.empty(self.count, np.float32)
            below = decode_reference(self._row(self.inputs.stand_in, base.bits), base)
            decode_block(self.inputs.rows[r], below, self.count, values)
            return exact_elements(values, dtype)
        start = int(self.inputs.places[r]) * bits // 8
        return self.inputs.rows[r, start : start + self.count * bits // 8]


def sum_to_zero(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0, up to what decimal fractions lose in binary (0.1 + 0.2 - 0.3)."""
    return abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights))


class Operation(ABC):
    """How the inputs of one tensor become one output.

    Law: `merge`, block by block, in any order and with any block size, writes exactly the bytes of `reference` on
    whole tensors, rounded once. Operations that need a quantity of the whole tensor have `passes`: in each, `measure`
    sees every block, and the next pass goes on with what `settle` makes of it.
    """

    kind: ClassVar[str]
    measures_deltas: ClassVar[bool] = False
    """Whether passes look at nothing but deltas against the first input, which are zero where no other is read."""
    calculates: ClassVar[bool] = True
    """Whether the output is calculated; False where it is the first input, bit by bit."""

    def depends_on(self, k: int) -> bool:
        """Whether the output depends on input `k`; it does not where weights or densities multiply it by zero."""
        del k
        return True

    @property
    def is_zero(self) -> bool:
        """Whether every element of the output is zero, whatever the inputs hold."""
        return False

    def cancels(self, inputs: Sequence[int]) -> bool:
        """Whether some inputs, which hold the same weights, cancel out: the output does not depend on what they hold.

        Args:
            inputs: their places among the inputs of the operation.
        """
        del inputs
        return False

    @property
    def keeps_equal_inputs(self) -> bool:
        """Whether the output equals the inputs, up to rounding, where all inputs that it depends on are equal."""
        return True

    @property
    def passes(self) -> int:
        """How many times the tensor must stream by before it can be merged."""
        return 0

    def without(self, inputs: Collection[int]) -> Self:
        """This operation where some inputs are not read at all, so that nothing need be known of them."""
        del inputs
        return self

    def sees(self, k: int) -> bool:
        """Whether the next pass looks at input `k`."""
        del k
        return True

    @property
    def draws_masks(self) -> bool:
        """Whether it needs `Block.masks`."""
        return False

    @property
    def alignment(self) -> int:
        """Elements of which every block must be a multiple; the last block of a tensor may be shorter."""
        return 1

    def measure(self, block: Block) -> Any:
        """What this pass takes from a block."""
        raise AssertionError(f"{self.kind} takes nothing from {block}")

    def unread(self, count: int) -> Any:
        """What the first pass takes from a block of `count` elements of which no delta is read."""
        raise AssertionError(f"{self.kind} looks at more than deltas in blocks of {count} elements")

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


@inner
def find_rows(inputs: Inputs, tile: int, rows: NDArray[np.int64]) -> bool:
    """Write to `rows` (int64, [inputs]) the row that each input is taken from in a tile of the block.

    Returns:
        Whether every row of the block holds BF16, so that vectors can be loaded from it as it is.
    """
    for k in range(len(rows)):
        rows[k] = inputs.row_of[k] if inputs.present[k, tile] else inputs.stand_in
    half = True
    for code in inputs.codes:
        half &= code == _BF16
    return half


@inner
def stage(inputs: Inputs, row: int, start: int, n: int, out: NDArray[np.float32], below: NDArray[np.float32]) -> None:
    """Elements `start` to `start + n` of a row as float32 in `out` ([TILE]), with zeros up to a whole vector.

    `below` ([1, TILE]) is what `stage_stand_in` brought there of the same elements.
    """
    if inputs.codes[row] >= LAYERED:
        decode_tile(inputs.rows[row], below, start // TILE, n, out)
        return
    decode(inputs.rows[row], inputs.codes[row], inputs.places[row] + start, n, out)
    for i in range(n, -(-n // LANES) * LANES):
        out[i] = ZERO


@inner
def stage_stand_in(inputs: Inputs, start: int, n: int, below: NDArray[np.float32]) -> None:
    """Bring a tile of the stand-in to `below` ([1, TILE]), where any row has layers: `stage` decodes them over it."""
    for code in inputs.codes:
        if code >= LAYERED:
            stage(inputs, inputs.stand_in, start, n, below[0], below)
            break


def tile_sum_reference(values: NDArray[Any], apart: NDArray[np.bool_] | None = None) -> float:
    """The sum over a whole tensor as kernels take it: lanes of every tile in the values' type, then all exactly.

    Values that are `apart` join only then, one by one.
    """
    others: list[float] = []
    if apart is not None:
        values, others = np.where(apart, values.dtype.type(0), values), values[apart].tolist()
    return math.fsum([*(_lane_sum_reference(values[i : i + TILE]) for i in range(0, len(values), TILE)), *others])


def _lane_sum_reference(values: NDArray[Any]) -> float:
    lanes = np.zeros(LANES, values.dtype)
    for row in np.pad(values, (0, -len(values) % LANES)).reshape(-1, LANES):
        lanes += row
    total = 0.0
    for lane in lanes:
        total += float(lane)
    return total
