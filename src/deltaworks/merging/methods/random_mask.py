"""Which elements stay by chance: random masks that any place of any tensor can be asked for.

An element stays where a random number of 16 bits is below its density in units of 2^-16, rounded up or down by chance
for each tile; so the chance is the density to 2^-80, while four elements share one 64-bit number. Those numbers are
SplitMix64's (Steele et al., OOPSLA 2014), read as a counter-based generator: a key and a counter give the number, in
any order and from any thread.
"""

from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.vector import LANES, bits_below, ramp

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_key(seed: int, expert: int, tensor: str) -> int:
    """64 bits from which the random mask of one expert's tensor is derived."""
    return int.from_bytes(blake3(f"{seed}\0{expert}\0{tensor}".encode()).digest(8), "little")


def _split_mix_reference(z: Any) -> Any:
    """SplitMix64's function of its state, for scalars, arrays and vectors of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


split_mix = kernel(_split_mix_reference)


def random_numbers_reference(key: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers, 0 to 65,535, of elements at flat indices, with NumPy."""
    at = places.astype(np.uint64)
    with np.errstate(over="ignore"):
        shared = _split_mix_reference(np.uint64(key) + (at // np.uint64(4) + np.uint64(1)) * GOLDEN)
    numbers: NDArray[np.int64] = (shared >> np.uint64(16) * (at % np.uint64(4)) & np.uint64(0xFFFF)).astype(np.int64)
    return numbers


def random_mask_reference(key: int, density: float, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether elements at flat indices stay, with NumPy."""
    with np.errstate(over="ignore"):
        of_tile = _split_mix_reference(np.uint64(key) - (places // TILE).astype(np.uint64) * GOLDEN)
    units, fraction = split_density(density)
    stays: NDArray[np.bool_] = random_numbers_reference(key, places) < units + (of_tile < np.uint64(fraction))
    return stays


def split_density(density: float) -> tuple[int, int]:
    """A density in units of 2^-16, and the fraction of such a unit in units of 2^-64."""
    units = int(density * 2.0**16)
    return units, int((density * 2.0**16 - units) * 2.0**64)


@inner
def round_density(key: int, density: NDArray[np.uint64], place: int) -> Any:
    """The density (see `split_density`) in a tile that begins at a flat index, rounded by chance: uint32."""
    number = split_mix(key - np.uint64(place // TILE) * GOLDEN)
    return np.uint32(density[0] + np.uint64(number < density[1]))


@inner
def draw_masks(key: int, density: int, place: int, n: int, masks: NDArray[np.uint16], k: int, start: int) -> None:
    """Which of the `n` elements of the tile at the flat index `place` stay, a bit each, to `masks[k, start:]`.

    Args:
        key: see `random_key`.
        density: see `round_density`.
        place: a multiple of the tile.
        n: elements.
        masks: uint16, [rows, an even number]; the first element is the lowest bit.
        k: the row.
        start: where in it.
    """
    group = np.uint64(place) >> np.uint64(2)
    counter = key + (group + np.uint64(1)) * GOLDEN
    for v in range(start, start + -(-n // LANES), 2):
        stay = bits_below(split_mix(ramp(counter, GOLDEN)), np.uint32(density))
        masks[k, v], masks[k, v + 1] = np.uint16(stay), np.uint16(stay >> np.uint32(16))
        counter += np.uint64(8) * GOLDEN
