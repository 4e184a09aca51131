"""What the catalog's statistics say of one expert's tensor."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.statistics import DENSITIES, DeltaTable

Deltas = Mapping[tuple[int, int], DeltaTable]
"""Statistics by the places in a plan of an expert and of the base it is taken against."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Statistics of one expert's tensor: a row a block."""

    table: DeltaTable
    rows: slice

    @property
    def square(self) -> NDArray[np.float64]:
        """Squared norm of each block's delta."""
        return self.table.delta_square[self.rows]

    @property
    def changed(self) -> NDArray[np.float64]:
        """Elements of each block that differ from the base's."""
        return self.table.changed[self.rows]

    def survives(self, density: float) -> NDArray[np.float64]:
        """Squared norm of what a trim to `density` leaves of each block, interpolated between those measured."""
        if density >= 1:
            return self.square
        if density <= 0:
            return np.zeros_like(self.square)
        known = (0.0, *DENSITIES, 1.0)
        i = bisect_right(known, density)
        measured = self.table.survives[self.rows]
        below = measured[:, i - 2].astype(np.float64) if i > 1 else 0.0
        above = measured[:, i - 1].astype(np.float64) if i <= len(DENSITIES) else self.square
        share = (density - known[i - 1]) / (known[i] - known[i - 1])
        between: NDArray[np.float64] = (1 - share) * below + share * above
        return between
