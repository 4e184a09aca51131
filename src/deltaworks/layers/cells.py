"""What the exact layers of a block consist of: the parts of a delta's range, and where its bits lie.

Elements of a delta are cut into cells of their group's range. A range is cut in one of five ways, in which the widths
of all cells are the same power of two times one, two or four: a cell then holds as many of a fine-tune's numbers as a
whole number of bits counts, and the numbers in the outer cells, which are rare, cost no more than those in the inner.

See ``docs/layers.md`` for the format.
"""

from typing import Final

import numpy as np

FORMAT_VERSION: Final = 5

DEPTH: Final = 7
"""Layers of a block: two of a draft; then, anew, sign and quarter of the range; its eighth; two bits more; up to eight
more; all the rest."""

DRAFTS: Final = 2
"""Layers of the draft, of which those that follow know nothing: who reads more reads none of them."""

GROUP: Final = 128
"""Elements that share a mean, in drafts, and a range, from there on."""

RAW: Final = 255
"""Range code of a group whose elements are kept as they are: some delta is infinite or NaN."""

OCTAVES: Final = 50
"""How far ranges reach down from the largest of their block, in powers of two."""

STEPS: Final = 4
"""Means an octave, in drafts."""

HIGHEST: Final = 15
"""The code of a block's largest mean; 0 stands for none, and those between are steps apart."""

WAYS: Final = 5
"""Ways to cut a range. There is one range of each an octave."""

_WIDTHS = ((1,) * 8, (1,) * 7 + (2,), (1,) * 6 + (2, 2), (1,) * 6 + (2, 4), (1, 1, 1, 1, 2, 2, 2, 4))

EDGES: Final = np.array([np.pad(np.cumsum((0, *w)), (0, 7)) for w in _WIDTHS], np.float32)
"""Where the eight cells begin and the last ends, in units of the narrowest: float32, [WAYS, 16], zeros at the end."""

CENTRES: Final = np.array(
    [
        (*row, 0.0, 0.0, 0.0, 0.0)
        for row in (
            (0.92, 2.78, 4.68, 7.05, 0.49, 1.47, 2.45, 3.43, 4.42, 5.41, 6.42, 7.37),
            (0.96, 2.91, 4.89, 7.19, 0.50, 1.49, 2.48, 3.48, 4.47, 5.47, 6.46, 7.86),
            (0.98, 2.94, 4.90, 7.45, 0.50, 1.49, 2.49, 3.48, 4.48, 5.47, 6.86, 8.87),
            (0.98, 2.94, 4.90, 7.74, 0.50, 1.49, 2.49, 3.48, 4.48, 5.47, 6.86, 9.39),
            (0.98, 2.94, 5.53, 9.87, 0.50, 1.49, 2.49, 3.48, 4.90, 6.86, 8.82, 11.72),
        )
    ],
    np.float32,
)
"""Mean magnitudes, in the same units, in the 4 and 8 cells of layers 3 and 4 where a group is normally distributed and
its range the smallest that holds it: float32, [WAYS, 4 + 8 and four zeros]."""

TOLD: Final = CENTRES * np.repeat(np.array([1.045, 1.015, 0.0], np.float32), (4, 8, 4))
"""What layers tell: means, raised so that along the delta what is told is as long as the delta (means are shorter, by
the share of its squares that they leave). The error grows by next to nothing, and models depend on that length."""

SHARES: Final = np.full((WAYS, 16), 1e30, np.float32)
"""How many of a normal group's elements lie in the first cell of layers 3 and 4, where CENTRES has those: float32,
[WAYS, 16], with a large number elsewhere."""
SHARES[:, (0, 4)] = ((0.664, 0.372), (0.435, 0.229), (0.388, 0.200), (0.382, 0.197), (0.380, 0.196))

RANGES: Final = np.array(
    [0.0, *(EDGES[i % WAYS, 8] * 2.0 ** (i // WAYS - OCTAVES) for i in range(WAYS * OCTAVES)), np.inf], np.float32
)
"""The range that a code stands for, relative to the block's top: float32, ascending."""

MEANS: Final = np.array([0.0, *(2.0 ** ((i - HIGHEST) / STEPS) for i in range(1, HIGHEST + 1))], np.float32)
"""The mean that a code stands for, relative to the block's top: float32, [16], ascending."""

FRACTIONS: Final = np.array([2.0 ** (i / STEPS) for i in range(STEPS)], np.float32)
"""Powers of two between one and two, in steps: what a top is beyond a whole octave."""
