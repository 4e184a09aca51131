"""SCE: select the elements on which experts differ most, calculate their weights from those, erase minority signs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import Cut, Histogram, Interval, place_cuts
from deltaworks.catalog.statistics import add_up
from deltaworks.checkpoints.codec import TILE
from deltaworks.merging.methods.delta import NEVER, close_cut, place_cut
from deltaworks.merging.methods.exact_sum import exact_sums
from deltaworks.merging.methods.operation import Block, Operation, tile_sum_reference
from deltaworks.merging.methods.sce_kernels import (
    SMALLEST_SHARE,
    Selection,
    merge_selected,
    selected_squares,
    spread_histogram,
)

SMALLEST_SQUARE = 1e-6
"""Experts whose mean squares come to less than this together count alike."""
_NONE = Cut(int(NEVER), 0, 0, 1)


class _Squares(NamedTuple):
    """What one pass takes from a block.

    Attributes:
        sums: float64, [tiles, experts + 1]; squares of what is selected of each delta. The last column adds up to the
            block's elements.
        lower: uint16, [elements]; the lower bits of the variances of elements of which it is not known yet.
        squares: float32, [elements, experts]; of their deltas.
    """

    sums: NDArray[np.float64]
    lower: NDArray[np.uint16]
    squares: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SelectedSum(Operation):
    """Select, calculate and erase; the first input is the base.

    SCE (Wan et al., FuseChat, arXiv 2408.07990, section 3.3), in numbers as mergekit's: of the elements on which the
    deltas are not all alike, the share `topk` stays on which their variance is largest. The mean squares of what stays
    of each delta, relative to those of all, are its share in the merge of the tensor. In each element, deltas of
    another sign than their sum's go (zero counts as positive), and the others are averaged by the shares.

    All arithmetic is float32 in the order of the experts, but for sums over tensors; of equal variances the first stay.

    Attributes:
        experts: how many there are.
        topk: `select_topk`, the share of elements that stays; all do from 1 on.
        cut: where in the order of variances it falls, once that is known.
        shares: of each expert, once the tensor's sums are known.
    """

    kind: ClassVar[str] = "sce"
    measures_deltas: ClassVar[bool] = True

    experts: int
    topk: float
    cut: Cut | Interval | None = None
    shares: tuple[float, ...] | None = None

    def depends_on(self, k: int) -> bool:
        """No delta counts where no element is selected."""
        return k == 0 or self.topk > 0

    @property
    def _selects(self) -> bool:
        return self.topk < 1

    @property
    def passes(self) -> int:
        """One for the shares; where elements are selected, one for the order of their variances before."""
        if self.topk <= 0 or self.shares is not None:
            return 0
        return 2 if self._selects and self.cut is None else 1

    def measure(self, block: Block) -> "Histogram | _Squares":
        """The histogram of a block's variances; then its squares."""
        if self._selects and self.cut is None:
            return Histogram(*spread_histogram(block.inputs, block.count, block.scratch))
        sums = np.zeros((max(1, -(-block.count // TILE)), self.experts + 1), np.float64)
        lower, squares = selected_squares(block.inputs, block.count, self._selection(block), block.scratch, sums)
        sums[0, -1] = block.count
        return _Squares(sums, lower[:, 0].copy(), squares.copy())

    def unread(self, count: int) -> "Histogram | _Squares":
        """See `Operation`."""
        if self._selects and self.cut is None:
            used = min(1, count)
            return Histogram(np.zeros(used, np.uint16), np.full(used, count, np.int64))
        sums = np.zeros((1, self.experts + 1), np.float64)
        sums[0, -1] = count
        return _Squares(sums, np.empty(0, np.uint16), np.empty((0, self.experts), np.float32))

    def settle(self, parts: Sequence[Any], block_size: int) -> Self:
        """This operation with its cut, as far as histograms tell; then with its exact place, and the shares."""
        if self._selects and self.cut is None:
            return replace(self, cut=_find_cut(parts, block_size, self.topk))
        sums, cut = [p.sums for p in parts], self.cut
        if isinstance(cut, Interval):
            cut = close_cut(cut, [p.lower for p in parts], block_size)
            for i, part in enumerate(parts):
                left = part.squares[_select_of_bin(part.lower, cut, i - cut.start // block_size)]
                sums.append(np.pad(left.astype(np.float64), ((0, 0), (0, 1))))
        *squares, size = exact_sums(sums)
        return replace(self, cut=cut, shares=expert_shares(squares, size))

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        shares = np.array(self.shares or [1.0] * self.experts, np.float32)
        selection = self._selection(block)
        return merge_selected(block.inputs, block.count, selection, shares, block.scratch, block.out, block.out_code)

    def _selection(self, block: Block) -> Selection:
        """What is selected in a block, as far as it is known."""
        cut, upper = self.cut if self._selects and self.topk > 0 else _NONE, -1
        if isinstance(cut, Interval):
            upper = cut.bin >> 1
            cut = Cut((upper + 1) << 16, block.start + block.count, 0, 1)
        threshold, ties = place_cut(cut, block)
        return Selection(self._selects, threshold, np.array(ties, np.int64), upper)

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same with NumPy."""
        base = inputs[0]
        deltas, torn = [x - base for x in inputs[1:]], np.zeros(base.shape, bool)
        if self._selects:
            selected, torn = _select_reference(deltas, self.topk)
            deltas = [np.where(selected, d, np.float32(0)) for d in deltas]
        squares = [tile_sum_reference(np.square(d), torn) for d in deltas]
        shares = [np.float32(s) for s in expert_shares(squares, base.size)]
        total = np.zeros_like(base)
        for d in deltas:
            total += d
        elected = np.where(total >= 0, np.float32(1), np.float32(-1))
        merged, divisor = np.zeros_like(base), np.zeros_like(base)
        for d, share in zip(deltas, shares, strict=True):
            agrees = np.sign(d) == elected
            merged += np.where(agrees, d * share, np.float32(0))
            divisor += np.where(agrees, share, np.float32(0))
        divisor[~(divisor > SMALLEST_SHARE)] = SMALLEST_SHARE
        return base + merged / divisor

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        return {"experts": self.experts, "select_topk": self.topk}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(content["experts"], content["select_topk"])


def _find_cut(blocks: Sequence[Histogram], block_size: int, topk: float) -> Cut | Interval:
    """The cut that selects the share `topk` of the elements whose variance is not zero, as far as histograms tell."""
    total = add_up(list(blocks))
    size = int(total.counts.sum())
    keep = selected_elements(topk, size - int(total.counts[total.bins == 0].sum()))
    return place_cuts(total, blocks, block_size, size, [keep])[0] if keep else _NONE


def _select_of_bin(lower: NDArray[np.uint16], cut: Cut, behind: int) -> NDArray[np.bool_]:
    """Which elements of a block in the cut's bin are selected; the block is so many behind that of the last equals."""
    equal = lower == cut.threshold & 0xFFFF
    first = len(lower) if behind < 0 else cut.quota if behind == 0 else 0
    selected: NDArray[np.bool_] = (lower > cut.threshold & 0xFFFF) | (equal & (np.cumsum(equal) <= first))
    return selected


def selected_elements(topk: float, nonzero: int) -> int:
    """How many elements `topk` selects, of so many whose variance is not zero."""
    return int(nonzero * topk)


def expert_shares(squares: Sequence[float], size: float) -> tuple[float, ...]:
    """The share of each expert, from the squared norm of what is selected of its delta in a tensor of `size`."""
    everyone = math.fsum(squares)
    if everyone == 0 or not everyone >= SMALLEST_SQUARE * size:
        return (1.0 / len(squares),) * len(squares)
    return tuple(s / everyone for s in squares)


def _select_reference(
    deltas: Sequence[NDArray[np.float32]], topk: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which elements are selected, and which stand in the bin of a histogram that the cut falls into."""
    total, spread = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for d in deltas:
        total += d
    mean = total / np.float32(len(deltas))
    for d in deltas:
        spread += np.square(d - mean)
    keys = np.abs(spread).view(np.uint32).astype(np.int64)
    selected = np.zeros(len(spread), bool)
    keep = selected_elements(max(0.0, topk), int(np.count_nonzero(keys)))
    descending = np.argsort(-keys, kind="stable")
    selected[descending[:keep]] = True
    if not keep or keys[descending[keep - 1]] & 0xFFFF == 0:
        return selected, np.zeros_like(selected)
    same = (keys >> 16 == keys[descending[keep - 1]] >> 16) & (keys & 0xFFFF != 0)
    return selected, same & (not selected[same].all())
