#!/usr/bin/env python3
"""Fit the values that the trellis code of drafts tells: prints `CODES` of `deltaworks.layers.trellis`.

    python benchmarks/make_trellis.py

For normally distributed groups, and for even ones, whose magnitudes lie about one size (what many steps of an optimiser
that normalises its gradients leave, where they go the same way), values and paths are improved in turn: the best path
for the values, then the mean of what each value stands for (Lloyd's method). The best of several starts is taken, and
the second layer is fitted to what the first leaves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.layers.cells import GROUP
from deltaworks.layers.trellis import find_path, told_reference, windows_reference

GROUPS = 480
STARTS, TURNS = 60, 25
EVEN_SPREADS = (0.3, 0.5)
"""Standard deviations of magnitudes about their size, by which even groups differ."""

Floats = NDArray[np.float32]


def walk(values: Floats, codes: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The best paths through tiles of values ([tiles, TILE]), and what they leave."""
    both, even = np.stack([codes, codes]), np.zeros(2, np.uint8)
    windows, left = np.empty(values.shape, np.int64), values.copy()
    groups = TILE // GROUP
    for tile in range(len(values)):
        packed = np.zeros(groups * 16 + 16, np.uint8)
        find_path(left[tile : tile + 1], groups, both, even, 0, packed, 0, np.empty(TILE, np.uint16))
        windows[tile] = windows_reference(packed[: groups * 16], groups)
        told = told_reference(packed[: groups * 16], groups, np.zeros(groups, bool), both)
        assert np.array_equal(left[tile], values[tile] - told)
    return windows, left


def fit(values: Floats, size: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Values for tiles, and what they leave, from random starts and from a sign."""
    best: tuple[Floats, Floats] | None = None
    sign = np.repeat([-1.0, 1.0], 8)
    for start in range(STARTS):
        first = rng.normal(size=16) if start % 2 else sign * rng.normal(1, 0.02 * start, 16)
        codes: Floats = (size * first).astype(np.float32)
        for _ in range(TURNS):
            windows, _ = walk(values, codes)
            count = np.bincount(windows.ravel(), minlength=16)
            total = np.bincount(windows.ravel(), weights=values.ravel(), minlength=16)
            codes = np.where(count > 0, total / np.maximum(count, 1), codes).round(3).astype(np.float32, copy=False)
        _, left = walk(values, codes)
        if best is None or np.square(left).sum() < np.square(best[1]).sum():
            best = codes, left
    assert best is not None
    return best


def main() -> None:
    rng = np.random.default_rng(0)
    shape = (GROUPS, GROUP)
    spread = rng.uniform(*EVEN_SPREADS, (GROUPS, 1))
    even = rng.choice([-1.0, 1.0], shape) * (1 + spread * rng.normal(size=shape))
    rows = []
    for groups in (rng.normal(size=shape), even):
        relative = groups / np.sqrt(np.square(groups).mean(axis=1, keepdims=True))
        values = relative.astype(np.float32).reshape(-1, TILE)
        first, left = fit(values, 1.0, rng)
        second, rest = fit(left, float(left.std()), rng)
        rows.append((first, second))
        print(f"# leaves {np.square(left).mean():.3f} and {np.square(rest).mean():.3f} of the squares")
    for layer in range(2):
        for row in rows:
            print([float(round(float(v), 3)) for v in row[layer]])


if __name__ == "__main__":
    main()
