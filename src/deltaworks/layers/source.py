"""An expert whose weight files are gone, read from its layers as if they were there."""

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.checkpoint import Checkpoint
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.source import Source
from deltaworks.errors import CheckpointError
from deltaworks.layers.file import LayeredTensor, LayerFile


class LayerSource:
    """Gives any elements of an expert back, bit by bit, a block at a time; see `Source`.

    Args:
        file: the expert's layers.
        base: open weight files of the model that they are over.
        base_checkpoint: its tensors.
    """

    def __init__(self, file: LayerFile, base: Source, base_checkpoint: Checkpoint) -> None:
        self._file, self._base, self._base_checkpoint = file, base, base_checkpoint

    def read_row(self, tensor: TensorInfo, start: int, count: int, row: NDArray[np.uint8], place: int) -> None:
        """Read elements `start` to `start + count` of `tensor` to byte `place` of `row` (uint8).

        Raises:
            CheckpointError: the tensor is not in the file, or its base's is gone.
            CatalogError: a layer is damaged.
        """
        kept = self._file.tensors.get(tensor.name)
        if kept is None:
            raise CheckpointError(f"{self._file.path} holds no tensor {tensor.name!r}")
        size, out = self._file.block_size, row[place:]
        for block in range(start // size, -(-(start + count) // size)):
            first, last = max(start, block * size), min(start + count, (block + 1) * size)
            elements = self._file.restore(kept, block, self._base_block(kept, block) if kept.is_delta else None)
            a, b = (tensor.dtype.nbytes(i - block * size) for i in (first, last))
            out[tensor.dtype.nbytes(first - start) : tensor.dtype.nbytes(last - start)] = elements[a:b]

    def _base_block(self, kept: LayeredTensor, block: int) -> NDArray[np.float32]:
        info = self._base_checkpoint.find(kept.name)
        if info is None:
            raise CheckpointError(f"the base lacks the tensor {kept.name!r}, over which layers were built")
        count = self._file.count(kept, block)
        raw = np.empty(info.dtype.nbytes(count), np.uint8)
        self._base.read(info, block * self._file.block_size, count, raw)
        return decode_reference(raw, info.dtype)

    def close(self) -> None:
        """Nothing: who opened the files closes them."""
