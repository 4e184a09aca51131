"""The layers of one block of several experts, read, checked and opened in one go.

Blocks of few layers are small and many, so what Python does for each would take longer than to read it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.reader import Announced
from deltaworks.checkpoints.together import read_bytes
from deltaworks.layers.checksum import checksum_of
from deltaworks.layers.file import SHIFTS, LayeredTensor, LayerFile, Places
from deltaworks.layers.opened import layers_start, open_block, opened_bytes


class LayerInput(NamedTuple):
    """Layers of one tensor of an expert.

    Attributes:
        file, tensor: what holds them.
        depths: int64, [blocks]; how many of each block are read.
    """

    file: LayerFile
    tensor: LayeredTensor
    depths: NDArray[np.int64]


class BlockReader:
    """Layers of one tensor of several experts; safe to share between threads.

    Args:
        inputs: of each expert.

    Attributes:
        opened: the most bytes that an opened block of each takes.
        nbytes: how many bytes are to be read of each.
    """

    def __init__(self, inputs: Sequence[LayerInput]) -> None:
        self._inputs = inputs
        self._depths = np.stack([i.depths for i in inputs])
        self._shifts = np.array([SHIFTS[DTYPES[i.tensor.dtype]] for i in inputs])
        self._places = places = Places.empty(*self._depths.shape)
        for k, own in enumerate(inputs):
            own.file.find_places(own.tensor, own.depths, k, places)
        nbytes = places.ranges[:, :, 1]
        self.nbytes: list[int] = np.where(self._depths > 0, nbytes, 0).sum(axis=1).tolist()
        largest = nbytes.max(axis=1).tolist()
        self.opened = [opened_bytes(i.file.count(i.tensor, 0), n) for i, n in zip(inputs, largest, strict=True)]

    def open(self, block: int, which: Sequence[int], raw: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Read the layers of a block and open them for `decode_tile`.

        Args:
            block: which.
            which: of some of the experts; of each, one layer at least is to be read.
            raw: uint8, [rows, at least `opened`], of `page_aligned`; some are set.
            rows: int64, one for each of the experts.

        Raises:
            CatalogError: a layer is damaged.
            BudgetError: this would exceed what the files may be read.
        """
        chosen = np.array(which)
        inputs = [self._inputs[k] for k in which]
        count = inputs[0].file.count(inputs[0].tensor, block)
        place, ranges = layers_start(count), self._places.ranges[chosen, block]
        got, sound = np.empty(len(which), np.int64), np.empty(len(which), np.bool_)
        announced: list[Announced] = []
        try:
            announced.extend(
                i.file.reader.announce(place, *own) for i, own in zip(inputs, ranges.tolist(), strict=True)
            )
            _open_rows(
                np.array([a.fd for a in announced]),
                ranges,
                self._places.checksums[chosen, block],
                self._places.checked[chosen, block],
                self._places.ends[chosen, block],
                self._depths[chosen, block],
                self._shifts[chosen],
                count,
                place,
                rows,
                raw,
                got,
                sound,
            )
        finally:
            for one in announced:
                one.release()
        for own, row, nbytes, is_sound in zip(inputs, rows, np.maximum(got, 0).tolist(), sound.tolist(), strict=True):
            own.file.reader.count(nbytes)
            if not is_sound:
                # A read that was cut short is taken up again; whatever is wrong is found and named.
                own.file.open_block(own.tensor, block, int(own.depths[block]), raw[row], done=nbytes)


@kernel
def _open_rows(
    fds: NDArray[np.int64],
    ranges: NDArray[np.int64],
    sums: NDArray[np.uint64],
    checked: NDArray[np.int64],
    ends: NDArray[np.int64],
    depths: NDArray[np.int64],
    shifts: NDArray[np.int64],
    count: int,
    place: int,
    rows: NDArray[np.int64],
    raw: NDArray[np.uint8],
    got: NDArray[np.int64],
    sound: NDArray[np.bool_],
) -> None:
    """Read, check and open one block of several experts; one entry an expert in each array but `raw`.

    Args:
        fds: int64; of open files.
        ranges: int64, [experts, 2]; from which byte on to read, and how many.
        sums: uint64; checksums of what is there.
        checked: int64; of how many bytes of it.
        ends: int64, [experts, DEPTH]; see `open_block`.
        depths: int64; likewise.
        shifts: int64; likewise.
        count: elements in the block.
        place: byte of each row to read to.
        rows: int64; which.
        raw: uint8, [rows, bytes]; set.
        got: int64; set to how many bytes were read, -1 after a failure.
        sound: bool; set to whether all were, and the row is opened.
    """
    for k in range(len(fds)):
        row, nbytes = raw[rows[k]], ranges[k, 1]
        got[k] = read_bytes(fds[k], ranges[k, 0], row[place : place + nbytes])
        sound[k] = False
        if got[k] == nbytes and checksum_of(row[place : place + checked[k]]) == sums[k]:
            open_block(row, count, ends[k], depths[k], shifts[k])
            sound[k] = True
