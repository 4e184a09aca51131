"""What the catalog's statistics say of one expert's tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.statistics import DENSITIES
from deltaworks.catalog.tables import DeltaTable

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


def surviving(deltas: Sequence[Delta], densities: Sequence[float]) -> NDArray[np.float64]:
    """Squared norms of what trims leave of each block, interpolated between those measured.

    Args:
        deltas: of some experts.
        densities: of the trim of each.

    Returns:
        float64, [experts, blocks].
    """
    square = np.stack([d.square for d in deltas])
    measured = np.zeros((*square.shape, len(DENSITIES) + 2))
    for own, delta in zip(measured, deltas, strict=True):
        own[:, 1:-1] = delta.table.survives[delta.rows]
    measured[:, :, -1] = square
    known, wanted = np.array([0.0, *DENSITIES, 1.0]), np.clip(densities, 0.0, 1.0)
    above = np.minimum(np.searchsorted(known, wanted, "right"), len(known) - 1)
    share = ((wanted - known[above - 1]) / (known[above] - known[above - 1]))[:, None]
    own = np.arange(len(deltas))
    between: NDArray[np.float64] = (1 - share) * measured[own, :, above - 1] + share * measured[own, :, above]
    return between
