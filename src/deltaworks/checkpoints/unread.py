"""Weights that stand beside those of a model under names that loaders do not look for."""

from deltaworks.checkpoints.checkpoint import Checkpoint, ShardFile
from deltaworks.checkpoints.header import read_header
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.tensor_names import is_recomputed
from deltaworks.checkpoints.weight_files import other_weights
from deltaworks.errors import CheckpointError


def unread_weights(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    """Sets of files beside a model's own that hold weights of all the shapes that the model has.

    Examples are ``consolidated.safetensors`` and ``model.fp16.safetensors``. Only their headers are read, so nothing is
    known of the values. A file that is damaged, or not a file of the model, is passed over.

    Returns:
        The names of the files of each set, sorted.
    """
    shapes = {t.shape for t in checkpoint.tensors.values() if not is_recomputed(t)}
    found = []
    for names in other_weights(checkpoint.path, [s.name for s in checkpoint.shards]):
        try:
            theirs = {shape for name in names for shape in _shapes(checkpoint, name)}
        except CheckpointError:
            continue
        if shapes <= theirs:
            found.append(names)
    return found


def _shapes(checkpoint: Checkpoint, name: str) -> set[tuple[int, ...]]:
    path = checkpoint.path / name
    ShardFile.of(path)
    with RangeReader(path, ByteCounter()) as reader:
        return {t.shape for t in read_header(reader).values()}
