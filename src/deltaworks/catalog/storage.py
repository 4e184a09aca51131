"""What reading costs on a storage: so many seconds a request, so many bytes a second."""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.models import Model
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.transfer import read_available

_SIZES = (1 << 12, 1 << 18, 1 << 21)
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class ReadCost:
    """A linear model of one reader on one storage.

    Attributes:
        request_s: seconds that a request costs, whatever its size.
        bytes_per_s: rate at which its bytes then arrive.
    """

    request_s: float
    bytes_per_s: float

    def seconds(self, requests: int, nbytes: int) -> float:
        """Time to read `nbytes` in so many requests, one after another."""
        return requests * self.request_s + nbytes / self.bytes_per_s

    @property
    def request_bytes(self) -> float:
        """How many bytes could be read in the time that a request costs."""
        return self.request_s * self.bytes_per_s


TYPICAL = ReadCost(1e-4, 1e9)
"""A local disk, for storages that were not measured."""


FAR_BYTES_PER_S = 5e8
"""Half of what two cores decode of layers, in bytes of the expert."""


def read_cost(catalog: Catalog, model: Model) -> ReadCost:
    """What reading from the storage that holds `model` costs, as far as the catalog knows; reads nothing."""
    found = catalog.find_storage(_device(model.path))
    return ReadCost(*found) if found else TYPICAL


def is_far(catalog: Catalog, model: Model) -> bool:
    """Whether `model` is on a storage so slow that its layers in the catalog are the shorter way, decoding included."""
    return not model.is_gone and read_cost(catalog, model).bytes_per_s < FAR_BYTES_PER_S


def measure_read_cost(catalog: Catalog, model: Model) -> ReadCost:
    """Fit the cost model to a few reads of `model`'s largest file, unless its storage is known already.

    The page cache is left aside where the file system allows it, so that it is the device that is measured.
    """
    device = _device(model.path)
    if (found := catalog.find_storage(device)) is not None:
        return ReadCost(*found)
    largest = max(model.checkpoint.shards, key=lambda s: s.size)
    if largest.size < 4 * _SIZES[-1]:
        return TYPICAL
    cost = fit(_sample(model.path / largest.name, largest.size))
    catalog.save_storage(device, cost.request_s, cost.bytes_per_s)
    return cost


def fit(samples: dict[int, float]) -> ReadCost:
    """The line through the times (seconds) of reads of several sizes (bytes), by least squares of relative error."""
    weights = {n: 1 / t**2 for n, t in samples.items()}
    total = sum(weights.values())
    mean_n = sum(w * n for n, w in weights.items()) / total
    mean_t = sum(weights[n] * t for n, t in samples.items()) / total
    spread = sum(w * (n - mean_n) ** 2 for n, w in weights.items())
    slope = sum(weights[n] * (n - mean_n) * (t - mean_t) for n, t in samples.items()) / spread
    slope = max(slope, 1e-12)
    return ReadCost(max(mean_t - slope * mean_n, 1e-7), 1 / slope)


def _sample(path: Path, size: int) -> dict[int, float]:
    buffer = mmap.mmap(-1, _SIZES[-1])
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:  # the file system has no direct reads
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        times: dict[int, list[float]] = {n: [] for n in _SIZES}
        step = (size - _SIZES[-1]) // (len(_SIZES) * _ROUNDS)
        for i in range(_ROUNDS):
            for j, n in enumerate(_SIZES):
                place = (i * len(_SIZES) + j) * step & -mmap.PAGESIZE
                started = time.perf_counter()
                read_available(file, memoryview(buffer)[:n], place)
                times[n].append(time.perf_counter() - started)
    finally:
        os.close(file)
    # Others use the storage too: the fastest read tells what it can do.
    return {n: min(t) for n, t in times.items()}


def _device(path: Path) -> str:
    return str(path.stat().st_dev)
