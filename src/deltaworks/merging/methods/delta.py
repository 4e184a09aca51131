"""Sums of deltas on a base: task arithmetic, TIES and DARE.

One operation covers the family, as one formula does: each delta is thinned out (by magnitude, at random, or not),
weighted, optionally kept only where its sign agrees with the majority, summed, optionally divided by the weights that
took part, scaled and added to the base.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.histogram import KEEP_ALL, Cut, Interval, kept_elements, pack_cut, place_ties, unpack_cut
from deltaworks.checkpoints.codec import TILE, encode
from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    NOT_FINITE,
    ONE,
    ZERO,
    bits,
    lanes_set,
    largest,
    load,
    maximum,
    ramp,
    select,
    splat,
    store,
    sum_in_order,
    widen,
)
from deltaworks.merging.methods.operation import (
    Block,
    Inputs,
    Operation,
    exact_sums,
    find_rows,
    stage,
    tile_sum_reference,
)

SMALLEST_MASS = 1e-7
_NEVER = np.uint32(0xFFFFFFFE)
"""A threshold above every magnitude, and so is the next."""


class Sparsify(StrEnum):
    """How a delta is thinned out."""

    NONE = "none"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class DeltaSum(Operation):
    """Thin out, weight, elect, sum and add deltas; the first input is the base.

    Task arithmetic (arXiv 2212.04089), TIES (2306.01708, section 3) and DARE (2311.03099, section 3). All arithmetic
    is float32 in the order of the experts; `rescale` restores each delta's L1 norm after thinning, as mergekit does.

    Attributes:
        weights: of each expert.
        densities: share of each delta that stays; matters only where `sparsify` is not none.
        sparsify: how.
        rescale: multiply each thinned delta so that its sum of magnitudes is what it was.
        consensus: keep only values whose sign is that of the weighted sum over all experts (zero counts as positive).
        normalize: divide by the sum of the weights that took part.
        scale: multiplies the merged delta (`lambda`).
        cuts: for magnitude, which elements of each delta stay; None where the density is 0 or 1.
        keys: for random, what each expert's random stream is derived from.
        scales: the factors of `rescale`, once the tensor's sums are known.
    """

    kind: ClassVar[str] = "delta"
    measures_deltas: ClassVar[bool] = True

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    sparsify: Sparsify
    rescale: bool
    consensus: bool
    normalize: bool
    scale: float
    cuts: tuple[Cut | Interval | None, ...] = ()
    keys: tuple[int, ...] = ()
    scales: tuple[float, ...] | None = None

    @property
    def passes(self) -> int:
        """One for cuts that are known as intervals only, one for the sums that `rescale` needs."""
        return int(self._has_open_cuts) + int(self._needs_masses)

    def without(self, inputs: Collection[int]) -> Self:
        """Deltas that are not read are zero, wherever they are cut."""
        cuts = [KEEP_ALL if k + 1 in inputs and isinstance(c, Interval) else c for k, c in enumerate(self.cuts)]
        return replace(self, cuts=tuple(cuts))

    def sees(self, k: int) -> bool:
        """The pass that places cuts looks at experts whose cuts are open, and at the base."""
        return not self._has_open_cuts or k == 0 or isinstance(self.cuts[k - 1], Interval)

    @property
    def _has_open_cuts(self) -> bool:
        return any(isinstance(c, Interval) for c in self.cuts)

    @property
    def _needs_masses(self) -> bool:
        thins = self.sparsify is not Sparsify.NONE and any(0 < d < 1 for d in self.densities)
        return self.rescale and thins and self.scales is None

    @property
    def alignment(self) -> int:
        """The block in which the statistics counted the ties of a cut must not be torn apart."""
        return max((c.align for c in self.cuts if isinstance(c, Cut)), default=1)

    def measure(self, block: Block) -> list[NDArray[np.uint16]] | NDArray[np.float64]:
        """The magnitudes of a block inside each open cut; then its partial sums, [tiles, 2 * experts]."""
        if self._has_open_cuts:
            return [self._inside(block, k) for k in range(len(self.weights))]
        sums = np.empty((-(-block.count // TILE), 2 * len(self.weights)), np.float64)
        delta_masses(block.inputs, block.start, block.count, self._thinning(block), block.scratch, sums)
        return sums

    def _inside(self, block: Block, k: int) -> NDArray[np.uint16]:
        cut = self.cuts[k]
        if not isinstance(cut, Interval):
            return np.empty(0, np.uint16)
        found = np.empty(block.count, np.uint16)
        count = collect_lower_bits(block.inputs, k + 1, block.count, cut.bin >> 1, block.scratch, found)
        return found[:count].copy()

    def settle(self, parts: Sequence[Any], block_size: int) -> Self:
        """This operation with its open cuts placed; or with the factors that restore each delta's sum of magnitudes."""
        if self._has_open_cuts:
            cuts = [
                close_cut(c, [part[k] for part in parts], block_size) if isinstance(c, Interval) else c
                for k, c in enumerate(self.cuts)
            ]
            return replace(self, cuts=tuple(cuts))
        sums = exact_sums(parts)
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return replace(self, scales=tuple(b / a if min(a, b) >= SMALLEST_MASS else 1.0 for b, a in pairs))

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        return merge_deltas(
            block.inputs,
            block.start,
            block.count,
            self._thinning(block),
            np.array(self.scales or [1.0] * len(self.weights), np.float32),
            np.array(self.weights, np.float32),
            self.consensus,
            self.normalize,
            np.float32(self.scale),
            block.scratch,
            block.out,
            block.out_code,
        )

    def _thinning(self, block: Block) -> "Thinning":
        """What of each delta stays in a block."""
        n = len(self.weights)
        result = Thinning(
            self.sparsify is Sparsify.RANDOM,
            np.zeros(n, np.uint32),
            np.zeros((n, 3), np.int64),
            np.zeros(n, np.uint64),
            np.full(n, ~np.uint64(0)),
        )
        result.ties[:, 0] = block.count
        for k, density in enumerate(self.densities):
            if self.sparsify is Sparsify.NONE or density >= 1:
                continue
            if density <= 0:
                result.thresholds[k] = _NEVER
            elif self.sparsify is Sparsify.RANDOM:
                result.keys[k], result.last[k] = self.keys[k], int(density * 2.0**64) - 1
            else:
                cut = self.cuts[k]
                assert isinstance(cut, Cut)
                result.thresholds[k] = cut.threshold
                if cut.start < block.start:
                    # The equals that stay all stand in earlier blocks; here the threshold itself is trimmed.
                    result.thresholds[k] += 1
                elif cut.start < block.start + block.count:
                    # Where the block of the last equals was omitted, none of a later block takes their place.
                    start = cut.start - block.start
                    result.ties[k] = start, cut.quota, start + cut.align
        return result

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same with NumPy."""
        base = inputs[0]
        deltas = [self._thin_reference(k, x - base) for k, x in enumerate(inputs[1:])]
        weights = [np.float32(w) for w in self.weights]
        deltas = [d * w for d, w in zip(deltas, weights, strict=True)]
        total = np.zeros_like(base)
        for d in deltas:
            total += d
        if self.consensus:
            elected = np.where(total >= 0, np.float32(1), np.float32(-1))
            total, divisor = np.zeros_like(base), np.zeros_like(base)
            for d, w in zip(deltas, weights, strict=True):
                agrees = np.sign(d) == elected
                total += np.where(agrees, d, np.float32(0))
                divisor += np.where(agrees, w, np.float32(0))
            divisor[divisor == 0] = 1
        else:
            everyone = sum(weights, np.float32(0))
            divisor = np.full_like(base, everyone if abs(everyone) >= np.float32(1e-8) else np.float32(1))
        if self.normalize:
            total /= divisor
        if self.scale != 1:
            total *= np.float32(self.scale)
        return base + total

    def _thin_reference(self, k: int, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        density, size = self.densities[k], len(delta)
        if self.sparsify is Sparsify.NONE or density >= 1 or size == 0:
            return delta
        if density <= 0:
            return np.zeros_like(delta)
        keep = np.zeros(size, bool)
        if self.sparsify is Sparsify.RANDOM:
            keep[:] = random_reference(self.keys[k], size) < np.uint64(int(density * 2.0**64))
        else:
            keep[np.argsort(-np.abs(delta), kind="stable")[: kept_elements(density, size)]] = True
        thinned = np.where(keep, delta, np.float32(0))
        if self.rescale:
            before, after = (tile_sum_reference(np.abs(x.astype(np.float64))) for x in (delta, thinned))
            if min(before, after) >= SMALLEST_MASS:
                thinned = thinned * np.float32(before / after)
        return thinned

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        content: dict[str, Any] = {
            "weights": list(self.weights),
            "consensus": self.consensus,
            "normalize": self.normalize,
            "lambda": self.scale,
        }
        if self.sparsify is not Sparsify.NONE:
            content |= {"sparsify": self.sparsify.value, "densities": list(self.densities), "rescale": self.rescale}
        if self.sparsify is Sparsify.MAGNITUDE:
            content["cuts"] = [c and list(pack_cut(c)) for c in self.cuts]
        if self.sparsify is Sparsify.RANDOM:
            content["keys"] = [f"{k:016x}" for k in self.keys]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        weights = tuple(content["weights"])
        return cls(
            weights,
            tuple(content.get("densities", [1.0] * len(weights))),
            Sparsify(content.get("sparsify", "none")),
            content.get("rescale", False),
            content["consensus"],
            content["normalize"],
            content["lambda"],
            tuple(None if c is None else unpack_cut(c) for c in content.get("cuts", [])),
            tuple(int(k, 16) for k in content.get("keys", [])),
        )


def close_cut(cut: Interval, inside: Sequence[NDArray[np.uint16]], block_size: int) -> Cut:
    """The exact place of a cut, from the lower bits of every magnitude inside its interval, block by block.

    Where blocks were omitted, fewer magnitudes are there than the statistics counted; the cut then falls at the same
    share of those that are.
    """
    descending = np.sort(np.concatenate(inside))[::-1]
    if not len(descending):
        return Cut((cut.bin >> 1 << 16) + 1, 0, 0, 1)
    rank = cut.rank if len(descending) == cut.total else max(1, cut.rank * len(descending) // cut.total)
    lower = int(descending[rank - 1])
    above = int(np.searchsorted(-descending.astype(np.int32), -lower))
    equals = [int(np.count_nonzero(part == lower)) for part in inside]
    return place_ties((cut.bin >> 1 << 16) | lower, equals, block_size, rank - above)


def lower_bits_reference(base: NDArray[np.float32], expert: NDArray[np.float32], upper: int) -> NDArray[np.uint16]:
    """What `collect_lower_bits` collects of a block (both flat), with NumPy."""
    magnitudes = np.abs(expert - base).view(np.uint32)
    inside = (magnitudes >> 16 == upper) & (magnitudes & 0xFFFF != 0)
    lower: NDArray[np.uint16] = (magnitudes[inside] & 0xFFFF).astype(np.uint16)
    return lower


@kernel
def collect_lower_bits(
    inputs: Inputs, k: int, count: int, upper: int, scratch: NDArray[np.float32], out: NDArray[np.uint16]
) -> int:
    """Write the lower 16 bits, not zero, of every magnitude of delta `k` whose upper 16 are `upper`; says how many."""
    rows = np.empty(len(inputs.present), np.int64)
    patterns = scratch[1].view(np.uint32)
    lower, sixteen, wanted = splat(np.uint32(0xFFFF)), splat(np.uint32(16)), splat(np.uint32(upper))
    found = 0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        find_rows(inputs, start // TILE, rows)
        stage(inputs, rows[0], start, n, scratch[0])
        stage(inputs, rows[k], start, n, scratch[1])
        for i in range(0, n, LANES):
            d = load(scratch, 1, i) - load(scratch, 0, i)
            magnitude = bits(d) & splat(MAGNITUDE)
            inside = ((magnitude >> sixteen) == wanted) & ((magnitude & lower) != splat(np.uint32(0)))
            if lanes_set(inside):
                store(scratch[1], i, d)
                for j in range(i, i + LANES):
                    part = patterns[j] & np.uint32(0xFFFF)
                    if (patterns[j] & MAGNITUDE) >> np.uint32(16) == np.uint32(upper) and part != np.uint32(0):
                        out[found] = np.uint16(part)
                        found += 1
    return found


def random_key(seed: int, expert: int, tensor: str) -> int:
    """64 bits from which the random stream of one expert's tensor is derived."""
    return int.from_bytes(blake3(f"{seed}\0{expert}\0{tensor}".encode()).digest(8), "little")


def random_reference(key: int, size: int) -> NDArray[np.uint64]:
    """Elements 0 to `size` of the random stream `key`, with NumPy."""
    return random_stream(key, np.arange(size))


def random_stream(key: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Some elements of the random stream `key`, with NumPy: SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Thinning(NamedTuple):
    """What of the deltas stays in one block, as kernels take it.

    Attributes:
        at_random: whether by chance.
        thresholds: uint32, [experts]; magnitudes (their float32 bits) from here on stay.
        ties: int64, [experts, 3]; from an element of the block on only so many magnitudes that equal the threshold
            stay, the first, and none from a later element on.
        keys: uint64, [experts]; of the random streams.
        last: uint64, [experts]; the largest random number with which an element stays.
    """

    at_random: bool
    thresholds: NDArray[np.uint32]
    ties: NDArray[np.int64]
    keys: NDArray[np.uint64]
    last: NDArray[np.uint64]


class Tile(NamedTuple):
    """The deltas that take part in one tile, as kernels take them: one entry an expert, at the front of each array.

    Attributes:
        rows: int64, [experts + 1]; where to load the base and then the experts from; see `load`.
        places: int64, [experts + 1]; likewise.
        experts: int64, [experts]; which they are.
        thresholds: uint32, [experts]; see `Thinning`.
        equals: int64, [experts]; how many magnitudes of each that equal its threshold stay.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    experts: NDArray[np.int64]
    thresholds: NDArray[np.uint32]
    equals: NDArray[np.int64]


@kernel
def _find_tile(inputs: Inputs, start: int, n: int, rows: NDArray[np.int64], tile: Tile) -> tuple[int, bool]:
    """Fill in `tile` but its thresholds; returns how many experts take part, and whether it can be loaded as it is."""
    half = find_rows(inputs, start // TILE, rows) and n % LANES == 0
    tile.rows[0], tile.places[0] = rows[0], inputs.places[rows[0]] + start
    found = 0
    for k in range(1, len(rows)):
        # What reads as the base has no delta.
        if rows[k] != rows[0]:
            tile.rows[found + 1], tile.places[found + 1] = rows[k], inputs.places[rows[k]] + start
            tile.experts[found] = k - 1
            found += 1
    return found, half


@kernel
def _stage_tile(inputs: Inputs, start: int, n: int, found: int, tile: Tile, scratch: NDArray[np.float32]) -> None:
    """Bring what a tile is made of to `scratch`, base first, and have it loaded from there."""
    for a in range(found + 1):
        stage(inputs, tile.rows[a], start, n, scratch[a])
        tile.rows[a], tile.places[a] = a, 0


@kernel
def _set_thresholds(
    table: NDArray[Any], start: int, n: int, found: int, thinning: Thinning, quotas: NDArray[np.int64], tile: Tile
) -> bool:
    """Fill in the thresholds of `tile`, and take what stays of their equals from `quotas`.

    Returns:
        Whether equals stay in one part of the tile and not in another; then nothing was taken from `quotas`.
    """
    torn = False
    for a in range(found):
        k = tile.experts[a]
        tile.thresholds[a], tile.equals[a] = thinning.thresholds[k], 0
        begin, end = thinning.ties[k, 0], thinning.ties[k, 2]
        if start + n <= begin:
            continue
        if quotas[k] == 0 or start >= end:
            tile.thresholds[a] += np.uint32(1)
            continue
        tile.equals[a] = _equals(table, n, a, tile)
        torn |= tile.equals[a] > quotas[k] or start < begin or start + n > end
    if not torn:
        for a in range(found):
            quotas[tile.experts[a]] -= tile.equals[a]
    return torn


@kernel
def _equals(table: NDArray[Any], n: int, a: int, tile: Tile) -> int:
    """How many magnitudes of a delta in the tile equal its threshold."""
    found = 0
    for i in range(0, n, LANES):
        d = load(table, tile.rows[a + 1], tile.places[a + 1] + i) - load(table, tile.rows[0], tile.places[0] + i)
        found += lanes_set((bits(d) & splat(MAGNITUDE)) == splat(tile.thresholds[a]))
    return found


@kernel
def _drop_equals(
    scratch: NDArray[np.float32],
    start: int,
    n: int,
    found: int,
    thinning: Thinning,
    quotas: NDArray[np.int64],
    tile: Tile,
) -> None:
    """Set to the base's, in a staged tile, the elements whose magnitudes equal the threshold and do not stay."""
    delta = np.empty(1, np.float32)
    pattern = delta.view(np.uint32)
    for a in range(found):
        k = tile.experts[a]
        x = scratch[a + 1]
        for i in range(max(0, thinning.ties[k, 0] - start), n):
            delta[0] = x[i] - scratch[0, i]
            if pattern[0] & MAGNITUDE == thinning.thresholds[k]:
                if quotas[k] > 0 and start + i < thinning.ties[k, 2]:
                    quotas[k] -= 1
                else:
                    x[i] = scratch[0, i]


@kernel
def delta_masses(
    inputs: Inputs,
    first: int,
    count: int,
    thinning: Thinning,
    scratch: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None:
    """Per tile and expert: the sum of a delta's magnitudes, before and after thinning."""
    experts = len(thinning.keys)
    quotas = thinning.ties[:, 1].copy()
    rows = np.empty(experts + 1, np.int64)
    tile = Tile(rows.copy(), rows.copy(), rows.copy(), np.zeros(experts, np.uint32), rows.copy())
    halves = inputs.rows.view(np.uint16)
    sums[:] = 0.0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        found, half = _find_tile(inputs, start, n, rows, tile)
        own = sums[start // TILE]
        if half and not _set_thresholds(halves, start, n, found, thinning, quotas, tile):
            _masses_tile(halves, n, found, thinning, first + start, tile, own)
            continue
        _stage_tile(inputs, start, n, found, tile, scratch)
        torn = _set_thresholds(scratch, start, n, found, thinning, quotas, tile)
        _masses_tile(scratch, n, found, thinning, first + start, tile, own)
        if torn:
            before = own.copy()
            _drop_equals(scratch, start, n, found, thinning, quotas, tile)
            _masses_tile(scratch, n, found, thinning, first + start, tile, own)
            own[::2] = before[::2]


@kernel
def _masses_tile(
    table: NDArray[Any],
    n: int,
    found: int,
    thinning: Thinning,
    place: int,
    tile: Tile,
    sums: NDArray[np.float64],
) -> None:
    """Sums of magnitudes in a tile that begins at the flat index `place`, before thinning and after."""
    magnitude, zero = splat(MAGNITUDE), splat(ZERO)
    for a in range(found):
        k = tile.experts[a]
        before, after = splat(0.0), splat(0.0)
        for i in range(0, n, LANES):
            d = load(table, tile.rows[a + 1], tile.places[a + 1] + i) - load(table, tile.rows[0], tile.places[0] + i)
            stays = (bits(d) & magnitude) >= splat(tile.thresholds[a])
            if thinning.at_random:
                stays = stays & _stays(thinning, k, place + i)
            d = select(d < zero, zero - d, d)
            before = before + widen(d)
            after = after + widen(select(stays, d, zero))
        sums[2 * k], sums[2 * k + 1] = sum_in_order(before), sum_in_order(after)


@kernel
def _stays(thinning: Thinning, k: int, place: int) -> Any:
    """Which of sixteen elements from the flat index `place` on stay of delta `k`, by chance."""
    z = splat(thinning.keys[k]) + ramp(np.uint64(place + 1)) * splat(np.uint64(0x9E3779B97F4A7C15))
    z = (z ^ (z >> splat(np.uint64(30)))) * splat(np.uint64(0xBF58476D1CE4E5B9))
    z = (z ^ (z >> splat(np.uint64(27)))) * splat(np.uint64(0x94D049BB133111EB))
    return (z ^ (z >> splat(np.uint64(31)))) <= splat(thinning.last[k])


@kernel
def merge_deltas(
    inputs: Inputs,
    first: int,
    count: int,
    thinning: Thinning,
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    consensus: bool,
    normalize: bool,
    scale: np.float32,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Merge one block; see `Block`, `DeltaSum` and `Thinning` for the arguments."""
    wrong = 0
    experts = len(weights)
    quotas = thinning.ties[:, 1].copy()
    rows = np.empty(experts + 1, np.int64)
    tile = Tile(rows.copy(), rows.copy(), rows.copy(), np.zeros(experts, np.uint32), rows.copy())
    halves, total = inputs.rows.view(np.uint16), scratch[experts + 1]
    scaled = False
    for k in range(experts):
        scaled |= scales[k] != ONE
    everyone = ZERO
    for k in range(experts):
        everyone += weights[k]
    if abs(everyone) < np.float32(1e-8):
        everyone = ONE
    how = (consensus, normalize, everyone, scale)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        found, half = _find_tile(inputs, start, n, rows, tile)
        if half and not _set_thresholds(halves, start, n, found, thinning, quotas, tile):
            largest_ = _merge_tile(halves, n, found, thinning, first + start, tile, scaled, scales, weights, how, total)
        else:
            _stage_tile(inputs, start, n, found, tile, scratch)
            if _set_thresholds(scratch, start, n, found, thinning, quotas, tile):
                _drop_equals(scratch, start, n, found, thinning, quotas, tile)
            largest_ = _merge_tile(
                scratch, n, found, thinning, first + start, tile, scaled, scales, weights, how, total
            )
        # Thinning or the vote could drop a NaN, which would then go unnoticed.
        wrong += 1 if largest_ >= NOT_FINITE else 0
        wrong += encode(total, n, out_code, out, start)
    return wrong


@kernel
def _merge_tile(
    table: NDArray[Any],
    n: int,
    found: int,
    thinning: Thinning,
    place: int,
    tile: Tile,
    scaled: bool,
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    how: tuple[bool, bool, np.float32, np.float32],
    out: NDArray[np.float32],
) -> Any:
    """Merge a tile that begins at the flat index `place`; returns the largest magnitude met, as bits."""
    consensus, normalize, everyone, scale = how
    zero, one, magnitude = splat(ZERO), splat(ONE), splat(MAGNITUDE)
    top = splat(np.uint32(0))
    for i in range(0, n, LANES):
        base = load(table, tile.rows[0], tile.places[0] + i)
        # Both signs are summed while the vote is open.
        total = positive = negative = for_positive = for_negative = zero
        for a in range(found):
            k = tile.experts[a]
            d = load(table, tile.rows[a + 1], tile.places[a + 1] + i) - base
            size = bits(d) & magnitude
            top = maximum(top, size)
            stays = size >= splat(tile.thresholds[a])
            if thinning.at_random:
                stays = stays & _stays(thinning, k, place + i)
            if scaled:
                d = d * splat(scales[k])
            weight = splat(weights[k])
            d = d * weight
            total = select(stays, total + d, total)
            if consensus:
                up, down = stays & (d > zero), stays & (d < zero)
                positive, negative = select(up, positive + d, positive), select(down, negative + d, negative)
                for_positive = select(up, for_positive + weight, for_positive)
                for_negative = select(down, for_negative + weight, for_negative)
        if consensus:
            elected = total >= zero
            total = select(elected, positive, negative)
            if normalize:
                divisor = select(elected, for_positive, for_negative)
                total = total / select(divisor != zero, divisor, one)
        elif normalize:
            total = total / splat(everyone)
        store(out, i, base + total * splat(scale))
    return largest(top)
