"""Checksums of layers: the kernel against NumPy, and what they find."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.layers.checksum import checksum_of, checksum_reference, prefix_checksums


def checksum(data: bytes) -> int:
    return int(checksum_of(np.frombuffer(data, np.uint8)))


@given(st.binary(max_size=400))
def test_the_kernel_does_what_the_reference_does(data: bytes) -> None:
    assert checksum(data) == checksum_reference(data)


@given(st.binary(max_size=400), st.lists(st.integers(0, 700), min_size=1, max_size=8))
def test_prefixes_are_checked_in_one_go_and_zeros_follow(data: bytes, ends: list[int]) -> None:
    places, found = np.array(sorted(ends)), np.empty(len(ends), np.uint64)
    prefix_checksums(np.frombuffer(data, np.uint8), places, found)
    padded = data + bytes(700)
    assert found.tolist() == [checksum_reference(padded[:end]) for end in places.tolist()]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 300])
def test_every_change_within_four_bytes_is_found(size: int) -> None:
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, size, np.uint8)
    sound = checksum(data.tobytes())
    for place in range(size):
        for change in (1, 128, 255, int(rng.integers(1, 256))):
            changed = data.copy()
            changed[place] ^= change
            assert checksum(changed.tobytes()) != sound


def test_other_changes_are_found() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 640, np.uint8)
    swapped, shifted, zeros = data.copy(), np.roll(data, 64), np.zeros(640, np.uint8)
    swapped[:64], swapped[64:128] = data[64:128], data[:64]
    turned = data.copy()
    turned[[3, 67]] ^= 128  # the highest bits of one lane, twice
    found = {checksum(x.tobytes()) for x in (data, swapped, shifted, zeros, zeros[:-1], turned)}
    assert len(found) == 6
