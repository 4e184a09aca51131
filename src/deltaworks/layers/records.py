"""The file that holds the layers of one expert: blocks one after the other, an index of them, and what they are of.

::

    magic, 8 bytes, and zeros to the end of a page where blocks take whole pages
    the layers of each block, the first to the last, block after block in any order; zeros to the end of a page, where
    blocks take whole pages, come after the drafts and after the last
    the index: one INDEX record a block, in the order of the tensors
    the residuals: one record for every so many blocks of a delta, in the same order
    the contents: JSON
    the end: END, which says where those three stand and what their checksums are

Whoever asks for so many layers of a block reads one range of the file: the drafts from its start on, or what comes
after them. Numbers are little-endian; checksums are those of `deltaworks.layers.checksum`. See ``docs/layers.md`` for
what is inside a block.

Imports nothing heavy.
"""

from pathlib import Path
from typing import Final

import numpy as np

from deltaworks.layers.cells import DEPTH

MAGIC: Final = b"DWLAYERS"
INDEX: Final = np.dtype(
    [("offset", "<u8"), ("ends", "<u4", DEPTH), ("checksums", "<u8", DEPTH), ("left", "<f4", DEPTH + 1)]
)
"""Of each block: its place in the file, where each layer would end if there were no zeros between them, the checksum of
what is read of so many layers, and the squares that remain of the delta then, none first."""
END: Final = np.dtype(
    [
        ("index", "<u8"),
        ("blocks", "<u8"),
        ("residuals", "<u8"),
        ("contents", "<u8"),
        ("contents_bytes", "<u8"),
        ("index_checksum", "<u8"),
        ("residuals_checksum", "<u8"),
        ("contents_checksum", "<u8"),
        ("magic", "S8"),
    ]
)


def index_place(path: Path) -> int | None:
    """The byte of a file at which its index begins and all that is read before any layer; None where it is not one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END.itemsize))
        tail = file.read()
    if len(tail) == END.itemsize and (end := np.frombuffer(tail, END)[0])["magic"] == MAGIC:
        return min(int(end["index"]), size)
    return None
