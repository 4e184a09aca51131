"""What each layer of each block of each expert adds to a merge, from indices of layers and statistics alone."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.file import UNKNOWN, LayeredTensor, LayerIndex, blocks_sharing, scale_sketches
from deltaworks.merging.contributions import trust_in
from deltaworks.merging.deltas import Delta
from deltaworks.merging.methods.delta import DeltaSum
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.products import inner_products
from deltaworks.merging.sampled import Sampled, Told, told_samples
from deltaworks.merging.selection import Number, Ranking, rank_layers

UNTOLD = 3.0
"""How much more a square that is left counts where a block of parts that add up is not read at all; where some layers
are, as much of it as they leave of the block's squares. What layers leave lies across the delta, and models hardly
mind; of a block that is not read they miss all that it has learnt. See ``docs/layers.md``."""


@dataclass(frozen=True)
class Menu:
    """To which depths the blocks of one tensor can be read, of every expert.

    An expert without layers is read whole or not at all. Depth 0 is not to read a block, DEPTH to read all of it.

    Attributes:
        deltas: statistics of each expert.
        tensors: the layers of each and the tensor in them; None where an expert has none.
        cost: int64, [blocks, experts, DEPTH + 1]; bytes; see UNKNOWN.
        left: float64, [blocks, experts, DEPTH + 1]; squares of what is left of the delta.
    """

    deltas: Sequence[Delta]
    tensors: Sequence[tuple[LayerIndex, LayeredTensor] | None]
    cost: NDArray[np.int64]
    left: NDArray[np.float64]

    @property
    def layered(self) -> NDArray[np.bool_]:
        """Which experts have layers: [experts]."""
        return np.array([t is not None for t in self.tensors])

    def parts(self) -> int:
        """How many records of residuals there are of each expert."""
        return -(-len(self.cost) // self._sharing)

    @property
    def _sharing(self) -> int:
        return blocks_sharing(self.deltas[0].table.block_size)

    def cost_of(self, depths: NDArray[np.int8]) -> NDArray[np.int64]:
        """Bytes of every block where so many layers are read: [blocks, experts]."""
        return _chosen(self.cost, depths)

    def share_left(self, depths: NDArray[np.int8]) -> NDArray[np.float64]:
        """Norms of what is left where so many layers are read, of those of the deltas: [blocks, experts]."""
        return _chosen(_relative(self.left), depths)

    def shared(self) -> NDArray[np.int64]:
        """How many blocks share each record of residuals: int64, [parts]."""
        return np.minimum(self._sharing, len(self.cost) - np.arange(self.parts()) * self._sharing)

    def stands_for(self) -> NDArray[np.int64]:
        """For how many blocks each sample of a record stands: int64, [parts]."""
        return np.minimum(self.shared(), SAMPLES)

    def owners(self) -> NDArray[np.int64]:
        """The block that each sample of a record is of: int64, [parts, SAMPLES]."""
        first = np.arange(self.parts())[:, None] * self._sharing
        return first + np.arange(SAMPLES) % self.shared()[:, None]

    def residual_samples(self, e: int) -> NDArray[np.float32]:
        """What so many layers of an expert leave, one first, at the samples: float32, [parts, DEPTH - 1, SAMPLES]."""
        found = self.tensors[e]
        assert found is not None
        index, tensor = found
        samples: NDArray[np.float32] = index.residuals["sample"][tensor.residual : tensor.residual + self.parts()]
        return samples

    def gram(self) -> NDArray[np.float64]:
        """Inner products of what so many layers, none first, leave of the tensor's deltas, by sketches of the tensor.

        Returns:
            float64, a row and a column for each depth of each expert.
        """
        parts, experts = self.parts(), len(self.deltas)
        starts = np.arange(parts) * self._sharing
        norms = np.sqrt(np.add.reduceat(self.left[:, :, 1:DEPTH], starts).swapaxes(0, 1), order="C")
        flat = np.empty((experts, DEPTH, parts, BUCKETS), np.float32)
        for e, (delta, found) in enumerate(zip(self.deltas, self.tensors, strict=True)):
            sketches = delta.table.sketch[delta.rows]
            flat[e, 0] = sketches if self._sharing == 1 else np.add.reduceat(sketches, starts, 0, np.float64)
            if found is None:
                flat[e, 1:] = 0.0
            else:
                index, tensor = found
                scale_sketches(index.raw_residuals[tensor.residual :][:parts], norms[e], flat[e, 1:])
        products = np.zeros((experts, DEPTH + 1, experts, DEPTH + 1))
        # All layers leave nothing.
        products[:, :DEPTH, :, :DEPTH] = inner_products(flat.reshape(experts * DEPTH, -1)).reshape(
            experts, DEPTH, experts, DEPTH
        )
        return products.reshape(experts * (DEPTH + 1), -1)


def make_menu(
    name: str,
    deltas: Sequence[Delta],
    indices: Sequence[LayerIndex | None],
    whole: NDArray[np.int64],
    gone: Sequence[bool],
) -> Menu | None:
    """The menu of one tensor.

    Args:
        name: of the tensor.
        deltas: statistics of each expert.
        indices: the layers of each, None where it has none.
        whole: int64, [blocks, experts]; bytes of each block as it is, 0 where it need not be read.
        gone: whether there is nothing of an expert but its layers.

    Returns:
        It, or None where no expert has layers of this tensor that come to less than the tensor.
    """
    cost = np.full((*whole.shape, DEPTH + 1), UNKNOWN, np.int64)
    left = np.zeros(cost.shape)
    cost[:, :, 0], cost[:, :, DEPTH] = 0, whole
    tensors: list[tuple[LayerIndex, LayeredTensor] | None] = []
    for e, (delta, index, is_gone) in enumerate(zip(deltas, indices, gone, strict=True)):
        left[:, e, 0] = delta.square
        tensor = index.tensors.get(name) if index is not None else None
        if index is None or tensor is None or not tensor.is_delta or index.block_size != delta.table.block_size:
            tensors.append(None)
            continue
        own = slice(tensor.first, tensor.first + tensor.blocks)
        costs, is_read = index.costs[own], whole[:, e] > 0
        if not is_gone and costs[is_read, -1].sum() >= whole[:, e].sum():
            tensors.append(None)
            continue
        tensors.append((index, tensor))
        left[:, e, 1:] = index.left[own, 1:]
        cost[is_read, e, 1:] = costs[is_read]
    return Menu(deltas, tensors, cost, left) if any(tensors) else None


class Layered(Protocol):
    """What the layers of the experts of one tensor add to its merge."""

    @property
    def menu(self) -> Menu:
        """What there is to choose from."""

    def rank(self) -> Ranking:
        """Rank what can be read."""

    def lost(self, depths: NDArray[np.int8]) -> float:
        """Squared error where blocks are read to such depths: [blocks, experts]."""


def rank_alone(menu: Menu, energies: NDArray[np.float64], shares: Sequence[float]) -> Ranking:
    """Rank what can be read by what each expert's own part is, relative to a share of its own.

    Args:
        menu: what can be read.
        energies: float64, [blocks, experts]; squares of each part.
        shares: what to weigh them by.
    """
    weights = np.array([1.0 / s if s > 0 else 0.0 for s in shares])
    return _rank(menu, np.sqrt(energies * weights)[:, :, None] * _relative(menu.left), _alone(len(weights)))


def _relative(left: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms of what is left, of those of the whole deltas."""
    return np.sqrt(_shares(left))


def _shares(left: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squares of what is left, of those of the whole deltas."""
    whole = left[:, :, :1]
    shares: NDArray[np.float64] = left * np.divide(1.0, whole, out=np.zeros_like(whole), where=whole > 0)
    return shares


def _chosen(values: NDArray[Number], depths: NDArray[np.int8]) -> NDArray[Number]:
    """Of values for every depth, [blocks, experts, DEPTH + 1], those of one depth each."""
    return np.take_along_axis(values, depths[:, :, None].astype(np.int64), 2)[:, :, 0]


def _alone(experts: int) -> NDArray[np.float64]:
    return np.eye(experts)[:, None, :, None] * np.ones((1, DEPTH + 1, 1, DEPTH + 1))


def _rank(menu: Menu, part: NDArray[np.float64], cosine: NDArray[np.float64]) -> Ranking:
    blocks, experts, _ = menu.cost.shape
    r = Ranking.empty(blocks, experts, DEPTH)
    rank_layers(menu.cost, part, cosine, r.order, r.depth, r.end, r.cost, r.gain)
    return r


def pool_cosines(tensors: Sequence[tuple[Menu, Sequence[int]]]) -> list[NDArray[np.float64]]:
    """Cosines between what layers leave of the experts of each tensor: [experts, DEPTH + 1, experts, DEPTH + 1] each.

    What is known of a small tensor is noisy (variance 1 / 128 for every record of residuals), and who chooses by noise
    is disappointed. So tensors are drawn towards all tensors together by as much as noise explains how they differ; see
    `Overlaps.of`, where blocks are drawn towards their tensor.

    Args:
        tensors: what can be read of each, and the places in the plan of its experts.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        grams = list(pool.map(lambda own: own[0].gram(), tensors))
    models = 1 + max((place for _, places in tensors for place in places), default=0)
    own = [_square_of(places, models) for _, places in tensors]
    total = np.zeros((models * (DEPTH + 1),) * 2)
    for square, gram in zip(own, grams, strict=True):
        total[square] += gram
    pooled, mixed = np.ascontiguousarray(_to_cosines(total)), []
    for (menu, places), square, gram in zip(tensors, own, grams, strict=True):
        others = pooled[square]
        cosines = _to_cosines(gram)
        trust = trust_in(_spread(cosines, others), 1.0 / (BUCKETS * menu.parts()))
        shape = (len(places), DEPTH + 1) * 2
        mixed.append((trust * cosines + (1 - trust) * others).reshape(shape))
    return mixed


@kernel
def _to_cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of inner products, a matrix; with ones on the diagonal."""
    scale, cosines = np.zeros(len(gram)), np.empty_like(gram)
    for i in range(len(gram)):
        scale[i] = 1.0 / np.sqrt(gram[i, i]) if gram[i, i] > 0 else 0.0
    for i in range(len(gram)):
        for j in range(len(gram)):
            cosines[i, j] = gram[i, j] * scale[i] * scale[j]
        cosines[i, i] = 1.0
    return cosines


@kernel
def _spread(cosines: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The mean square of how far cosines between different experts are from others."""
    total, many = 0.0, 0
    for i in range(len(cosines)):
        for j in range(len(cosines)):
            if i // (DEPTH + 1) != j // (DEPTH + 1):
                apart = cosines[i, j] - others[i, j]
                total += apart * apart
                many += apart != 0.0
    return total / max(1, many)


def _square_of(places: Sequence[int], models: int) -> Any:
    """What picks the rows and columns of some models out of a matrix of all of them; views where that is all."""
    if [*places] == [*range(models)]:
        return ...
    rows = (np.array(places)[:, None] * (DEPTH + 1) + np.arange(DEPTH + 1)).ravel()
    return np.ix_(rows, rows)


@dataclass
class OverlappingLayers:
    """Parts that add up; see `Overlapping`.

    Attributes:
        menu: what can be read.
        coefficients: float64, [experts]; what each delta is multiplied by.
        thinning: float64, [experts]; by how much random thinning raises its energy.
        cosines: as `pool_cosines` gives them.
    """

    menu: Menu
    coefficients: NDArray[np.float64]
    thinning: NDArray[np.float64]
    cosines: NDArray[np.float64]

    @cached_property
    def _cosine(self) -> NDArray[np.float64]:
        if (self.thinning == 1.0).all():
            return self.cosines
        cosine, own = self.cosines.copy(), range(len(self.thinning))
        cosine[own, :, own, :] *= self.thinning[:, None, None]
        return cosine

    def rank(self) -> Ranking:
        """See `Layered`; by what squares count, see UNTOLD."""
        return _rank(self.menu, _parts(self.menu.left, self.coefficients, UNTOLD), self._cosine)

    def lost(self, depths: NDArray[np.int8]) -> float:
        """See `Layered`."""
        return float(layers_loss(_parts(self.menu.left, self.coefficients, 0.0), self._cosine, depths))


@kernel
def _parts(left: NDArray[np.float64], coefficients: NDArray[np.float64], untold: float) -> NDArray[np.float64]:
    """Norms of what layers leave of parts of a merge, for `rank_layers`; see `Menu` for `left`, UNTOLD for `untold`."""
    blocks, experts, depths = left.shape
    parts = np.empty_like(left)
    for b in range(blocks):
        for e in range(experts):
            whole = left[b, e, 0]
            each = untold / whole if whole > 0.0 else 0.0
            for x in range(depths):
                parts[b, e, x] = np.sqrt(left[b, e, x] * (1.0 + each * left[b, e, x])) * coefficients[e]
    return parts


@kernel
def layers_loss(part: NDArray[np.float64], cosine: NDArray[np.float64], depths: NDArray[np.int8]) -> float:
    """Squared error over all places; see `rank_layers` for `part` and `cosine`, and `Choice` for `depths`."""
    places, experts = depths.shape
    total = 0.0
    for p in range(places):
        error = 0.0
        for e in range(experts):
            own = part[p, e, depths[p, e]]
            for f in range(experts):
                error += own * part[p, f, depths[p, f]] * cosine[e, depths[p, e], f, depths[p, f]]
        total += max(error, 0.0)
    return total


@dataclass(frozen=True)
class SampledLayers:
    """Parts of which every element hangs on all of them, seen through samples; see `Sampled`.

    Attributes:
        menu: what can be read.
        whole: the same where experts are read whole or not at all.
        told: what samples are where only some layers are read.
    """

    menu: Menu
    whole: Sampled
    told: Told

    @cached_property
    def _missing(self) -> NDArray[np.float64]:
        """The share of squares that so many layers miss, over the whole tensor: float64, [DEPTH + 1]."""
        has_layers = self.menu.layered
        told = self.told.samples[:, has_layers]
        missed = np.square((told - told[:, :, DEPTH:]).astype(np.float64)).sum(axis=(0, 1, 3))
        if missed[0] > 0:
            share: NDArray[np.float64] = missed / missed[0]
            return share
        return np.arange(DEPTH, -1, -1) / DEPTH

    def rank(self) -> Ranking:
        """See `Layered`; each expert by itself, as the election of one block is seen through too few samples."""
        energies = self.whole.energies()
        return _rank(self.menu, np.sqrt(energies[:, :, None] * self._missing), _alone(energies.shape[1]))

    def lost(self, depths: NDArray[np.int8]) -> float:
        """See `Layered`."""
        error = self.whole.told_loss(self.told, depths)
        return float(error + (self.whole.residual * self._missing[depths]).sum())


def sampled_layers(menu: Menu, operation: DeltaSum | SelectedSum, whole: Sampled, count: int) -> SampledLayers:
    """What layers tell a merge of which every element hangs on all experts.

    Args:
        menu: what can be read.
        operation: how the tensor is made.
        whole: what is known of the experts as a whole.
        count: elements in the tensor.
    """
    owners, stands_for = menu.owners(), menu.stands_for()
    slots = np.arange(SAMPLES)
    scale = np.sqrt(stands_for.astype(np.float32))[:, None]
    told = np.zeros((menu.parts(), len(menu.deltas), DEPTH + 1, SAMPLES), np.float32)
    for e, delta in enumerate(menu.deltas):
        told[:, e, DEPTH] = whole.samples[owners, e, slots] * scale
        if menu.tensors[e] is not None:
            exact = delta.table.sample[delta.rows][owners, slots]
            for x in range(1, DEPTH):
                seen = exact - menu.residual_samples(e)[:, x - 1]
                factor = whole.factors[owners, e] * scale
                told[:, e, x] = told_samples(operation, e, delta, count, owners, seen) * factor
    return SampledLayers(menu, whole, Told(told, owners, stands_for))
