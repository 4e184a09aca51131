"""Checksums of the layers of a block, as fast as memory, inside compiled kernels.

Sixteen lanes of 32 bits take in 64 bytes at a time: each is mixed with its part of them, rotated and multiplied by an
odd number. Every step is one to one in the lane and in what is mixed in, and so is what makes 64 bits of the lanes in
the end, for each of its inputs; so any change within four bytes is found for certain, and others but for one in 2^32.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.vector import LANES, bits, floats, lanes, splat

_STEP = 4 * LANES
_ODD = np.uint32(0x9E3779B1)
_TURN, _BACK = np.uint32(13), np.uint32(19)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@inlined
def _take_in(state: Any, words: Any) -> Any:
    mixed = state ^ words
    return ((mixed << splat(_TURN)) | (mixed >> splat(_BACK))) * splat(_ODD)


@inner
def _finish(state: NDArray[np.uint32], nbytes: int) -> np.uint64:
    """64 bits of the lanes and of how many bytes they took in."""
    h = np.uint64(nbytes)
    for i in range(0, LANES, 2):
        h ^= np.uint64(state[i]) | np.uint64(state[i + 1]) << np.uint64(32)
        h = (h ^ (h >> np.uint64(30))) * _MIX_1
        h = (h ^ (h >> np.uint64(27))) * _MIX_2
        h ^= h >> np.uint64(31)
    return h


@kernel
def prefix_checksums(data: NDArray[np.uint8], ends: NDArray[np.int64], out: NDArray[np.uint64]) -> None:
    """The checksums of what comes before each of some places.

    Args:
        data: uint8; zeros follow it.
        ends: int64; the places, none before the one before it.
        out: uint64; set.
    """
    whole = len(data) // _STEP * _STEP
    words = data[:whole].view(np.float32).reshape((1, whole // 4))
    rest = np.empty(_STEP, np.uint8)
    rest_words = rest.view(np.float32).reshape((1, LANES))
    lanes_out = np.empty(LANES, np.float32)
    state = (lanes() + splat(np.uint32(1))) * splat(_ODD)
    done = 0
    for e in range(len(ends)):
        for i in range(done, ends[e] // _STEP * _STEP, _STEP):
            if i < whole:
                state = _take_in(state, bits(load(words, 0, i // 4)))
            else:
                for j in range(_STEP):
                    rest[j] = data[i + j] if i + j < len(data) else np.uint8(0)
                state = _take_in(state, bits(load(rest_words, 0, 0)))
            done = i + _STEP
        last = state
        if done < ends[e]:
            for j in range(_STEP):
                inside = done + j < min(ends[e], len(data))
                rest[j] = data[done + j] if inside else np.uint8(0)
            last = _take_in(state, bits(load(rest_words, 0, 0)))
        store(lanes_out, 0, floats(last))
        out[e] = _finish(lanes_out.view(np.uint32), ends[e])


@kernel
def checksum_of(data: NDArray[np.uint8]) -> np.uint64:
    """The checksum of all of some bytes (uint8)."""
    ends, out = np.empty(1, np.int64), np.empty(1, np.uint64)
    ends[0] = len(data)
    prefix_checksums(data, ends, out)
    return out[0]  # type: ignore[no-any-return]


def checksum_reference(data: bytes) -> int:
    """The same as `checksum_of`, with NumPy."""
    padded = np.frombuffer(data + bytes(-len(data) % _STEP), "<u4").reshape(-1, LANES)
    state = np.arange(1, LANES + 1, dtype=np.uint32) * _ODD
    for words in padded:
        mixed = state ^ words
        state = ((mixed << _TURN) | (mixed >> _BACK)) * _ODD
    h = len(data)
    for i in range(0, LANES, 2):
        h ^= int(state[i]) | int(state[i + 1]) << 32
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            h = (h ^ (h >> shift)) * int(factor) % 2**64
        h ^= h >> 31
    return h
