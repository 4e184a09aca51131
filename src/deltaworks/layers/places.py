"""Layers 5 to 7: which of the numbers in its cell each element is, inside compiled kernels."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import (
    bytes_above,
    bytes_where,
    from_pairs,
    less_one,
    lookup_bytes,
    shifted_sum,
    splat_bytes,
    sums_of_eight,
    widened,
)
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, inner
from deltaworks.checkpoints.memory_vector import (
    load,
    load_at,
    load_bytes,
    load_packed,
    prefetch,
    room,
    store,
    store_packed,
)
from deltaworks.checkpoints.vector import (
    LANES,
    bits,
    floats,
    lanes,
    leading_zeros,
    lookup,
    maximum,
    minimum,
    splat,
    unpacked,
)
from deltaworks.layers.arithmetic import number_at, places_before, places_of, scaled, signed
from deltaworks.layers.bitstream import (
    count_ones,
    interleaved,
    next_word,
    scatter,
    some_bits,
    take_word,
    whole_bits,
)
from deltaworks.layers.cells import DEPTH, EDGES, GROUP, RAW
from deltaworks.layers.opened import STRIDE, Parts, changed_of, put_told, write_base
from deltaworks.layers.wide_places import decode_wide_places

_ONE = np.uint32(1)
_HALF = np.uint64(0xFFFFFFFF)
_ALL, _LANES = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0xFFFF)
_WIDEST = 16
"""Bits of the widest place in a cell that is found together with STRIDE - 1 others."""
_NARROW_FROM = 32 - _WIDEST
"""Types that leave so many bits of a float32 at zero have no wider ones."""
_TOLD_BITS = 10
"""Bits of a place that layers 5 and 6 tell."""


def _table_of(values: Iterable[int]) -> tuple[np.uint64, np.uint64]:
    """What widths from 1 to _WIDEST stand for; see `lookup_bytes`."""
    words = np.array([*values], np.uint8).view(np.uint64)
    return words[0], words[1]


_SECOND = [min(max(0, width - 2), 8) for width in range(1, _WIDEST + 1)]
_THIRD = [max(0, width - _TOLD_BITS) for width in range(1, _WIDEST + 1)]
_SECOND_BITS, _THIRD_BITS = _table_of(_SECOND), _table_of(_THIRD)
_SECOND_FIELDS = _table_of((1 << n) - 1 for n in _SECOND)
_SECOND_MIDDLES, _THIRD_MIDDLES = (_table_of(1 << n >> 1 for n in part) for part in (_SECOND, _THIRD))
"""Of places of every width: how many bits are in layers 6 and 7, as many ones, and the middle of what they can say."""

_PLANES = _WIDEST - _TOLD_BITS
"""Bits of a place that layer 7 tells."""
_STRIDES = TILE // STRIDE + 1
_AT_ONCE = np.uint64(57)
"""Bits that `some_bits` gives at least."""
_SIX, _UP = np.uint64(6), np.uint64(1)

_of_strides = room(types.uint64, _STRIDES)
_of_planes = room(types.uint64, _PLANES * _STRIDES + 1)
_of_eights = room(types.uint64, (TILE + STRIDE) // 8)
_of_vectors = room(types.uint64, _STRIDES * STRIDE // LANES)
_numbers, _halves, _bytes = (room(kind, TILE + STRIDE) for kind in (types.float32, types.uint16, types.uint8))
_group_numbers, _group_bytes = (room(kind, GROUP + STRIDE) for kind in (types.float32, types.uint8))


class _Kept(NamedTuple):
    """What is known of the changed elements of a tile on the way, one after the other: little else takes vectors whole.

    Words are found by unsigned numbers: of others, Numba looks whether they count from the end.

    Attributes:
        where: uint64; which of every STRIDE elements of the tile changed.
        base: float32; of a group, the base's numbers.
        cells: uint8; of a group, in which cells the deltas lie.
        numbers: float32; the bits of the ranks of the first numbers of the cells, then the numbers that are told.
        lasts: uint16; how many numbers follow those in the cells. Set where places are not told to the end.
        widths: uint8; of the ranks of the last places, how many of 32 bits are zero; then how many bits the places
            have, less one.
        rest: uint64; bytes of what layer 6 tells of the places.
        counts: uint64; how many bits that is for every eight places.
        lower: uint64, for every STRIDE; what layer 5 tells of the places of the first half.
        upper: uint64, likewise; and of the second.
        above: uint64, for every STRIDE; of which the places have more than _TOLD_BITS bits, more than one more, and so
            on to the widest.
        planes: uint64, likewise; those bits.
    """

    where: NDArray[np.uint64]
    base: NDArray[np.float32]
    cells: NDArray[np.uint8]
    numbers: NDArray[np.float32]
    lasts: NDArray[np.uint16]
    widths: NDArray[np.uint8]
    rest: NDArray[np.uint64]
    counts: NDArray[np.uint64]
    lower: NDArray[np.uint64]
    upper: NDArray[np.uint64]
    above: NDArray[np.uint64]
    planes: NDArray[np.uint64]


@inner
def decode_places(
    row: NDArray[np.uint8],
    parts: Parts,
    base: NDArray[np.float32],
    count: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """A tile of which 5, 6 or 7 layers were asked for; see `put_told`."""
    wide, changes = parts.shift < _NARROW_FROM, False
    for g in range(-(-count // GROUP)):
        code = row[parts.ranges + g]
        wide |= code == RAW
        changes |= code != 0
    if not changes:
        if weight is None:
            for i in range(0, count, STRIDE):
                write_base(base, i, out)
        return
    if wide:
        decode_wide_places(row, parts, base, count, weight, sums, out)
        return
    kept = _Kept(
        _of_strides(),
        _group_numbers(),
        _group_bytes(),
        _numbers(),
        _halves(),
        _bytes(),
        _of_eights(),
        _of_eights(),
        _of_strides(),
        _of_strides(),
        _of_planes(),
        _of_planes(),
    )
    _prefetch_next(row, parts)
    many = _find_cells(row, parts, base, count, kept)
    _take_places(row, parts, count, many, kept)
    _find_numbers(parts, many, kept)
    own = 0
    for i in range(0, count, STRIDE):
        where = kept.where[np.uint64(i) >> _SIX]
        if where == _ALL:
            for j in range(0, STRIDE, LANES):
                put_told(load_at(kept.numbers, own + j), _ALL, base, i, j, weight, sums, out)
            own += STRIDE
        elif where != np.uint64(0) or weight is None:
            for j in range(0, STRIDE, LANES):
                changed = np.uint32(where >> np.uint64(j) & _LANES)
                put_told(load_packed(kept.numbers, own, unpacked(changed)), where, base, i, j, weight, sums, out)
                own += count_ones(changed)


@inlined
def _prefetch_next(row: NDArray[np.uint8], parts: Parts) -> None:
    """Begin to bring what the next tile needs: there are more streams than a processor follows by itself."""
    for line in range(TILE // 8, TILE // 4, 64):
        prefetch(row, 0, (parts.signs >> 3) + line)
        prefetch(row, 0, (parts.planes[0] >> 3) + line)
        prefetch(row, 0, (parts.planes[1] >> 3) + line)
        prefetch(row, 0, (parts.planes[2] >> 3) + line)
        prefetch(row, 0, (parts.streams[0] >> 3) + line)
        prefetch(row, 0, (parts.streams[1] >> 3) + line)
        prefetch(row, 0, (parts.mask >> 3) + line)


@inner
def _find_cells(row: NDArray[np.uint8], parts: Parts, base: NDArray[np.float32], count: int, kept: _Kept) -> int:
    """Bring together the changed elements of a tile, and find the ends of their cells; returns how many there are."""
    depth, top = parts.depth, parts.range_top
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    shift, one = splat(parts.shift), splat(_ONE)
    eight = splat(np.uint32(8))
    every = lanes() & splat(np.uint32(7))
    many = 0
    for g in range(0, count, GROUP):
        code = int(row[parts.ranges + g // GROUP])
        n, end = 0, min(g + GROUP, count)
        for i in range(g, end, STRIDE):
            where = changed_of(row, parts, i, count) if code != 0 else np.uint64(0)
            kept.where[np.uint64(i) >> _SIX] = where
            n += count_ones(where)
        numbers, first_number = base[0], g
        if 0 < n < GROUP:
            numbers, first_number = kept.base, 0
            _bring_together(base, g, end, kept)
        if n > 0:
            for j in range(0, n, STRIDE):
                if sparse:
                    negative, i2 = next_word(row, at + j), next_word(row, at + j + bit2)
                    i3, i4 = next_word(row, at + j + bit3), next_word(row, at + j + bit4)
                else:
                    negative, i2 = whole_bits(row, at + j), whole_bits(row, at + j + bit2)
                    i3, i4 = whole_bits(row, at + j + bit3), whole_bits(row, at + j + bit4)
                cell = bytes_where(negative, np.uint8(8)) | bytes_where(i2, np.uint8(4))
                store(kept.cells, j, cell | bytes_where(i3, np.uint8(2)) | bytes_where(i4, np.uint8(1)))
            edges = scaled(EDGES, code, top)
            # The two ends of every cell, those of positive deltas in the first eight lanes.
            inner, outer = lookup(edges, every), lookup(edges, every + one)
            low = signed(lanes() >= eight, outer, inner)
            high = signed(lanes() >= eight, inner, outer)
            for j in range(0, n, LANES):
                cell, b = load_at(kept.cells, j), load_at(numbers, first_number + j)
                first = places_of(b + lookup(low, cell), shift)
                # One less than none where the cell is empty; the last of 32 bits is then set.
                last = places_before(b + lookup(high, cell), shift) - first
                store(kept.numbers, many + j, floats(first))
                store(kept.widths, many + j, leading_zeros(last))
                if depth < DEPTH:
                    store(kept.lasts, many + j, maximum(last + one, one) - one)
            many += n
        at += n if sparse else GROUP
    store(kept.widths, many, splat_bytes(np.uint8(32)))
    return many


@inlined
def _bring_together(base: NDArray[np.float32], first: int, end: int, kept: _Kept) -> None:
    """Put the numbers of the base at changed elements of a group one after the other."""
    n = 0
    for i in range(first, end, STRIDE):
        where = kept.where[np.uint64(i) >> _SIX]
        for j in range(0, STRIDE, LANES):
            changed = np.uint32(where >> np.uint64(j) & _LANES)
            store_packed(kept.base, n, load(base, 0, i + j), unpacked(changed))
            n += count_ones(changed)


@inner
def _take_places(row: NDArray[np.uint8], parts: Parts, count: int, many: int, kept: _Kept) -> None:
    """Find what layers tell of all places."""
    depth, first = parts.depth, parts.streams[0]
    all_above = np.uint64(0)
    for i in range(0, many, STRIDE):
        # None of 32 zeros are 32 bits as much as all: there are no places with so many.
        widths = (splat_bytes(np.uint8(0)) - load_bytes(kept.widths, i)) & splat_bytes(np.uint8(31))
        index, s = less_one(widths), np.uint64(i) >> _SIX
        store(kept.widths, i, index)
        ones, twos = bytes_above(widths, np.uint8(0)), bytes_above(widths, np.uint8(1))
        pairs = interleaved(ones & _HALF, twos & _HALF)
        kept.lower[s] = take_word(row, first, pairs)
        first += count_ones(pairs)
        pairs = interleaved(ones >> np.uint64(32), twos >> np.uint64(32))
        kept.upper[s] = take_word(row, first, pairs)
        first += count_ones(pairs)
        if depth > 5:
            store(kept.rest, i >> 3, lookup_bytes(_SECOND_FIELDS, index))
            store(kept.counts, i >> 3, sums_of_eight(lookup_bytes(_SECOND_BITS, index)))
            above = bytes_above(widths, np.uint8(_TOLD_BITS))
            all_above |= above
            kept.above[s] = above
            if above != np.uint64(0):
                for x in range(_PLANES):
                    kept.above[np.uint64(x * _STRIDES) + s] = bytes_above(widths, np.uint8(_TOLD_BITS + x))
                    kept.planes[np.uint64(x * _STRIDES) + s] = np.uint64(0)
            else:
                for x in range(1, _PLANES):
                    kept.above[np.uint64(x * _STRIDES) + s] = np.uint64(0)
    if depth > 5:
        _take_rest(row, parts.streams[1], many, kept.counts, kept.rest)
    if depth > 6 and all_above != np.uint64(0):
        _take_planes(row, parts.streams[2], count, kept)


@inner
def _take_rest(
    row: NDArray[np.uint8], first: int, many: int, counts: NDArray[np.uint64], rest: NDArray[np.uint64]
) -> None:
    """Put the next bits of a row to the bits that are set in words of `rest`, of which `counts` tells how many."""
    bit, k, end = np.uint64(first), np.uint64(0), np.uint64((many + 7) // 8)
    while k < end:
        second, third, fourth = k + _UP, k + np.uint64(2), k + np.uint64(3)
        at_second = counts[k]
        at_third = at_second + counts[second]
        at_fourth = at_third + counts[third]
        every = at_fourth + counts[fourth]
        if every <= _AT_ONCE:
            word = some_bits(row, bit)
            rest[k], rest[second] = scatter(word, rest[k]), scatter(word >> at_second, rest[second])
            rest[third], rest[fourth] = scatter(word >> at_third, rest[third]), scatter(word >> at_fourth, rest[fourth])
        else:
            rest[k], rest[second] = take_word(row, bit, rest[k]), take_word(row, bit + at_second, rest[second])
            rest[third] = take_word(row, bit + at_third, rest[third])
            rest[fourth] = take_word(row, bit + at_fourth, rest[fourth])
        bit += every
        k = fourth + _UP


@inner
def _take_planes(row: NDArray[np.uint8], bit: int, count: int, kept: _Kept) -> None:
    """Find what layer 7 tells of the places, which is there for every LANES elements of the tile together."""
    found, used = _of_vectors(), np.uint64(0)
    own, s, end = np.uint64(0), np.uint64(0), np.uint64(count + STRIDE - 1) >> _SIX
    while s < end:
        where = kept.where[s]
        wanted = scatter(_bits_of(kept.above, 0, own), where)
        # No branch, which would be a matter of luck: those of which nothing is wanted are written over.
        for j in range(0, STRIDE, LANES):
            before = where & ((_UP << np.uint64(j)) - _UP)
            n = np.uint64(count_ones(where >> np.uint64(j) & _LANES))
            found[used] = (own + np.uint64(count_ones(before))) << _SIX | n
            used += np.uint64(wanted >> np.uint64(j) & _LANES != np.uint64(0))
        own += np.uint64(count_ones(where))
        s += _UP
    at, k = np.uint64(bit), np.uint64(0)
    while k < used:
        own, ones = found[k] >> _SIX, (_UP << (found[k] & np.uint64(63))) - _UP
        k += _UP
        a, b = _bits_of(kept.above, 0, own) & ones, _bits_of(kept.above, 1, own) & ones
        c, d = _bits_of(kept.above, 2, own) & ones, _bits_of(kept.above, 3, own) & ones
        e, f = _bits_of(kept.above, 4, own) & ones, _bits_of(kept.above, 5, own) & ones
        at_b = np.uint64(count_ones(a))
        at_c = at_b + np.uint64(count_ones(b))
        at_d = at_c + np.uint64(count_ones(c))
        at_e = at_d + np.uint64(count_ones(d))
        at_f = at_e + np.uint64(count_ones(e))
        every = at_f + np.uint64(count_ones(f))
        if every <= _AT_ONCE:
            word = some_bits(row, at)
            a, b, c = scatter(word, a), scatter(word >> at_b, b), scatter(word >> at_c, c)
            d, e, f = scatter(word >> at_d, d), scatter(word >> at_e, e), scatter(word >> at_f, f)
        else:
            a, b, c = take_word(row, at, a), take_word(row, at + at_b, b), take_word(row, at + at_c, c)
            d, e, f = take_word(row, at + at_d, d), take_word(row, at + at_e, e), take_word(row, at + at_f, f)
        at += every
        _set_bits(kept.planes, 0, own, a)
        _set_bits(kept.planes, 1, own, b)
        _set_bits(kept.planes, 2, own, c)
        _set_bits(kept.planes, 3, own, d)
        _set_bits(kept.planes, 4, own, e)
        _set_bits(kept.planes, 5, own, f)


@inlined
def _bits_of(words: NDArray[np.uint64], plane: int, bit: np.uint64) -> np.uint64:
    """The 64 bits of a plane from place `bit` on."""
    at, own = np.uint64(plane * _STRIDES) + (bit >> _SIX), bit & np.uint64(63)
    found: np.uint64 = words[at] >> own | words[at + _UP] << _UP << (np.uint64(63) - own)
    return found


@inlined
def _set_bits(words: NDArray[np.uint64], plane: int, bit: np.uint64, x: np.uint64) -> None:
    """Set bits of a plane from place `bit` on."""
    at, own = np.uint64(plane * _STRIDES) + (bit >> _SIX), bit & np.uint64(63)
    words[at] |= x << own
    words[at + _UP] |= x >> _UP >> (np.uint64(63) - own)


@inner
def _find_numbers(parts: Parts, many: int, kept: _Kept) -> None:
    """Find the numbers from the ranks of the first in their cells and their places there."""
    depth, shift = parts.depth, splat(parts.shift)
    for i in range(0, many, STRIDE):
        s = np.uint64(i) >> _SIX
        index = load_bytes(kept.widths, i)
        found = from_pairs(kept.lower[s], kept.upper[s])
        # What is not told is taken to be in the middle, of layer 5 by what was added already.
        rest = load_bytes(kept.rest, i >> 3) if depth > 5 else lookup_bytes(_SECOND_MIDDLES, index)
        places = shifted_sum(found, lookup_bytes(_SECOND_BITS, index), rest)
        if depth < 6 or kept.above[s] != np.uint64(0):
            rest = splat_bytes(np.uint8(0))
            if depth > 6:
                rest = bytes_where(kept.planes[s], np.uint8(1))
                for x in range(1, _PLANES):
                    rest = _with_plane(
                        rest, kept.above[np.uint64(x * _STRIDES) + s], kept.planes[np.uint64(x * _STRIDES) + s]
                    )
            elif depth > 5:
                rest = lookup_bytes(_THIRD_MIDDLES, index)
            places = shifted_sum(places, lookup_bytes(_THIRD_BITS, index), rest)
        a, b, c, d = widened(places)
        if depth < DEPTH:
            a, b = minimum(a, load_at(kept.lasts, i)), minimum(b, load_at(kept.lasts, i + LANES))
            c, d = minimum(c, load_at(kept.lasts, i + 2 * LANES)), minimum(d, load_at(kept.lasts, i + 3 * LANES))
        store(kept.numbers, i, number_at(bits(load_at(kept.numbers, i)) + a, shift))
        store(kept.numbers, i + LANES, number_at(bits(load_at(kept.numbers, i + LANES)) + b, shift))
        store(kept.numbers, i + 2 * LANES, number_at(bits(load_at(kept.numbers, i + 2 * LANES)) + c, shift))
        store(kept.numbers, i + 3 * LANES, number_at(bits(load_at(kept.numbers, i + 3 * LANES)) + d, shift))


@inlined
def _with_plane(rest: Any, wanted: np.uint64, plane: np.uint64) -> Any:
    """Numbers (U8) with one more bit where one is wanted."""
    return rest + bytes_where(wanted, rest) + bytes_where(plane, np.uint8(1))
