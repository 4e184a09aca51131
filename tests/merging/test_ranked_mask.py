"""Ranks of magnitudes in rows of any length."""

import numpy as np

from deltaworks.merging.methods.ranked_mask import _fill_bins, _make_row


def test_what_follows_a_row_has_no_bin_beyond_its_own() -> None:
    part, bins = _make_row(20), 16
    part.sizes[0, :20] = np.arange(1, 21, dtype=np.float32) * np.float32(1e-6)
    part.sizes[0, 20:40] = 1e6
    assert _fill_bins(part, 0, 20, 21, bins)
    assert part.bins.max() == bins - 1
    assert part.below[bins] == 20
