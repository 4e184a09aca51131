"""The identity of a model: a hash of what its weight files hold."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blake3 import blake3

from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.progress import Progress

_CHUNK = 8 << 20


def hash_file(path: Path, counter: ByteCounter, progress: Progress) -> str:
    """BLAKE3 of a file's contents, in hex."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = np.empty(_CHUNK, np.uint8)
    with RangeReader(path, counter) as reader:
        size = reader.size
        for start in range(0, size, _CHUNK):
            part = buffer[: min(_CHUNK, size - start)]
            reader.read_into(part, start)
            hasher.update(part.data)
            progress.advance(len(part))
    return hasher.hexdigest()


def hash_files(paths: Iterable[Path], counter: ByteCounter, progress: Progress) -> list[str]:
    """BLAKE3 of each file, two files at a time so that reading one overlaps hashing the other."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda path: hash_file(path, counter, progress), paths))


def combine(names: Iterable[str], digests: Iterable[str]) -> str:
    """The fingerprint of a model whose weight files have these names and digests."""
    hasher = blake3()
    for name, digest in zip(names, digests, strict=True):
        hasher.update(f"{name}\0{digest}\n".encode())
    return hasher.hexdigest()
