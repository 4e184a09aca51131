"""One output tensor in a plan: what may be read of it, what is, and what that costs and loses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.models import Model
from deltaworks.catalog.statistics import DEFAULT_BLOCK_SIZE
from deltaworks.catalog.storage import ReadCost
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.errors import RecipeError
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.file import LayerIndex
from deltaworks.merging.contributions import (
    Contribution,
    Overlapping,
    Overlaps,
    coefficients_of,
    contribution,
)
from deltaworks.merging.deltas import Delta, Deltas
from deltaworks.merging.layered import (
    Layered,
    Menu,
    OverlappingLayers,
    make_menu,
    rank_alone,
    sampled_layers,
)
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.delta import DeltaSum
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.plan import Depths, InputTensor, Plan, PlannedTensor, Ranges
from deltaworks.merging.sampled import Sampled
from deltaworks.merging.selection import Choice, Ranking

_INDEX_EPSILON = 1e-5
"""How far off what an index of layers says is left may be: sums of float32 squares, of 128 elements each."""
_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the catalog knows for a plan.

    Attributes:
        models: the plan's models, in its order.
        deltas: statistics by the places of an expert and of its base.
        read_cost: of the storage that holds the experts.
        overlaps: cosines between deltas; kept from plan to plan.
        layers: by the place of each expert that may be read from layers over the same base.
    """

    models: Sequence[Model]
    deltas: Deltas
    read_cost: ReadCost
    overlaps: Overlaps
    layers: Mapping[int, LayerIndex] = field(default_factory=dict)


def relative(lost: float, full: float) -> float:
    """A relative error from squares, with six digits: more would differ from machine to machine.

    Zero means that nothing is lost; where something is and the full merge changes nothing, it is 1.
    """
    if lost <= 0:
        return 0.0
    return float(f"{math.sqrt(lost / full):.6g}") if full > 0 else 1.0


class Candidate:
    """One output tensor: what may be read of it, what is, and what that costs and loses."""

    def __init__(self, plan: Plan, tensor: PlannedTensor, knowledge: Knowledge, block_size: int) -> None:
        self.tensor, self._block_size = tensor, block_size
        self.experts = [k for k, i in enumerate(tensor.inputs) if plan.models[i.model].role != "base"]
        self.stand_in = _stand_in(plan, tensor, self.experts) if self.experts else None
        self.reads: NDArray[np.bool_] = np.zeros((0, 0), bool)
        self.contribution: Contribution | None = None
        self.menu: Menu | None = None
        self._layered: Layered | None = None
        self._depths: NDArray[np.int8] = np.zeros((0, 0), np.int8)
        self.lost = 0.0
        self._full: float | None = None
        self.is_fixed = False
        self.requests = 0
        self.bytes_by_expert: list[int] = []
        self._runs: list[Ranges] = []
        if self.stand_in is None:
            return
        self._indices = [knowledge.layers.get(tensor.inputs[k].model) for k in self.experts]
        self._gone = [knowledge.models[tensor.inputs[k].model].is_gone for k in self.experts]
        self._infos = [
            tensor_of(knowledge.models[tensor.inputs[k].model], tensor.inputs[k].tensor) for k in self.experts
        ]
        self._base_info = tensor_of(knowledge.models[self.stand_in.model], self.stand_in.tensor)
        count = max(1, -(-tensor.count // block_size))
        elements = np.full(count, block_size, np.int64)
        elements[-1] = tensor.count - (count - 1) * block_size
        self._size = elements[:, None] * np.array([i.dtype.bits for i in self._infos]) // 8
        self.cost = self._size
        self.norms = np.zeros(self.cost.shape)
        self._base_square = np.zeros(count)
        deltas = [self._delta(k, i, knowledge) for k, i in zip(self.experts, self._infos, strict=True)]
        known = [d for d in deltas if d is not None]
        self.deltas = known if len(known) == len(deltas) else []

    def weigh(self, overlaps: Overlaps) -> None:
        """Work out what the experts add, and which of their blocks need not be read at all."""
        deltas = self.deltas
        if not deltas:
            return
        found = contribution(self.tensor.operation, self.experts, deltas, overlaps, self.tensor.count)
        self.contribution = found
        self.is_fixed = isinstance(found, Overlapping) and found.is_fixed
        self.norms = found.norms if isinstance(found, Overlapping) else self.norms
        self._base_square = deltas[0].table.base_square[deltas[0].rows]
        # Doubles are told apart as float32 only, so one that looks unchanged may not be.
        exact = np.array([i.dtype.bits <= 32 for i in self._infos])
        frozen = (np.stack([d.changed for d in deltas], axis=1) == 0) & exact
        self.cost = np.where(frozen, 0, self.cost)
        names = {self.tensor.inputs[k].tensor for k in self.experts}
        # Layers are read in their own blocks, which may be too small for what has to be seen together.
        fits = self._block_size % self.tensor.operation.alignment == 0
        if any(self._indices) and len(names) == 1 and fits:
            self.menu = make_menu(names.pop(), self.deltas, self._indices, self.cost, self._gone)

    @property
    def whole_bytes(self) -> int:
        """What all that it may read comes to."""
        return int((self.cost if self.menu is None else self.menu.cost[:, :, DEPTH]).sum())

    def everything(self, request: int) -> Choice:
        """The choice to read all of it; see `rank` for `request`."""
        places = -(-len(self.cost) // self._run(request))
        return Choice(np.full((places, len(self.experts)), DEPTH, np.int8), 0.0)

    @property
    def places(self) -> list[int]:
        """The experts' places in the plan."""
        return [self.tensor.inputs[k].model for k in self.experts]

    def weigh_layers(self, menu: Menu, cosines: NDArray[np.float64]) -> None:
        """Take note of what the experts' layers add where they add up; see `pool_cosines`."""
        coefficients = coefficients_of(self.tensor.operation, self.experts, self.deltas)
        self._layered = OverlappingLayers(menu, *coefficients, cosines)

    @property
    def adds_layers(self) -> bool:
        """Whether the parts of the experts add up, and are read from layers."""
        return self.menu is not None and not isinstance(self.contribution, Sampled)

    @property
    def full(self) -> float:
        """Squared norm of the full merged delta."""
        if self._full is None:
            self._full = self.contribution.full if self.contribution is not None else 0.0
        return self._full

    def _delta(self, k: int, info: TensorInfo, knowledge: Knowledge) -> Delta | None:
        source = self.tensor.inputs[k]
        assert self.stand_in is not None
        table = knowledge.deltas.get((source.model, self.stand_in.model))
        # Where both leave a tied head out, its delta is that of the embeddings.
        rows = table.rows.get(info.name if info.name == self._base_info.name else source.tensor) if table else None
        return Delta(table, rows) if table is not None and rows is not None else None

    def rank(self, shares: dict[int, float] | None, request: int) -> Ranking:
        """What the selection chooses from.

        Args:
            shares: what each expert adds to the merge by itself, to weigh all of them alike.
            request: bytes that are to be read at once, at least.
        """
        weighed = self.contribution
        if self.menu is not None and isinstance(weighed, Sampled):
            assert isinstance(self.tensor.operation, DeltaSum | SelectedSum)
            self._layered = sampled_layers(self.menu, self.tensor.operation, weighed, self.tensor.count)
        if self._layered is not None and weighed is not None:
            if shares is None:
                return self._layered.rank()
            return rank_alone(self._layered.menu, weighed.energies(), [shares[place] for place in self.places])
        if weighed is None or shares is not None:
            gram = np.zeros((*self.cost.shape, len(self.experts)))
            if weighed is not None and shares is not None:
                for e, place in enumerate(self.places):
                    own = shares[place]
                    gram[:, e, e] = weighed.energies()[:, e] / own if own > 0 else 0.0
            weighed = Overlapping(gram, 0.0, self.norms, is_fixed=False)
        ranking = weighed.rank(self.cost, self._run(request))
        if isinstance(weighed, Sampled):
            self._full = float(ranking.gain.sum())  # all that reading everything takes off; to sample it again is dear
        return ranking

    def _run(self, request: int) -> int:
        """How many blocks are chosen together; of layers, which the catalog's own disk holds, each by itself."""
        if self.menu is not None:
            return 1
        return max(1, round(request / max(1, int(self._size[0].max()))))

    def settle(self, choice: Choice, request: int, *, is_account: bool) -> None:
        """Take note of which places are read, and of what that loses.

        Args:
            choice: what was chosen.
            request: bytes that are read at once, at least.
            is_account: whether the choice accounts for the error, where it is of whole blocks.
        """
        self._depths = np.repeat(choice.depths, self._run(request), axis=0)[: len(self.cost)]
        self._depths[self.cost == 0] = 0
        self.reads = self._depths > 0
        if self.is_exact():
            self.lost = 0.0
        elif self._layered is not None:
            self.lost = self._layered.lost(self._depths)
        elif self.contribution is not None:
            self.lost = choice.lost if is_account else self.contribution.lost(self.reads)
        cost = np.where(self.reads, self.cost, 0) if self.menu is None else self.menu.cost_of(self._depths)
        self.bytes_by_expert = [int(n) for n in cost.sum(axis=0)]
        limit = max(1, DEFAULT_BLOCK_SIZE // self._block_size, self._run(request))
        self._runs = runs_of(self.reads)
        has_layers = self._has_layers()
        self.requests = sum(
            int(self.reads[:, e].sum()) if has_layers[e] else sum(-(-(b - a) // limit) for a, b in runs)
            for e, runs in enumerate(self._runs)
        )

    def _has_layers(self) -> list[bool]:
        """Which experts are read from layers."""
        if self.menu is None:
            return [False] * len(self.experts)
        found: list[bool] = self.menu.layered.tolist()
        return found

    def is_exact(self) -> bool:
        """Whether nothing is left out."""
        return bool(((self._depths == DEPTH) | (self.cost == 0)).all())

    def planned_reads(self) -> NDArray[np.bool_]:
        """Which blocks the tensor's plan reads: [blocks, experts]."""
        reads = np.ones(self.cost.shape, bool)
        for e, k in enumerate(self.experts):
            ranges = self.tensor.reads[k] if self.tensor.reads else None
            if ranges is not None:
                reads[:, e] = False
                for a, b in ranges:
                    reads[a:b, e] = True
        return reads

    def omitted_norm(self) -> float:
        """The square of the most that omitted blocks can make up, with room for rounding."""
        missing = (self._depths < DEPTH) & (self.cost > 0)
        norms = self.norms
        if self.menu is not None:
            norms = norms * self.menu.share_left(self._depths) * (1 + _INDEX_EPSILON)
        sums = np.where(missing, norms, 0.0).sum(axis=1)
        slack = _EPSILON * (len(self.experts) + 2) * np.sqrt(self._base_square) * missing.any(axis=1)
        return float(np.square(sums * (1 + 1e-6) + slack).sum())

    def planned(self) -> PlannedTensor:
        """The tensor as the plan has it."""
        if self.stand_in is None:
            return self.tensor
        norm = float(f"{math.sqrt(self.full):.6g}") if self.contribution is not None else None
        depths: list[Depths | None] = [None] * len(self.tensor.inputs)
        nbytes = [0] * len(self.tensor.inputs)
        for e, (k, has_layers) in enumerate(zip(self.experts, self._has_layers(), strict=True)):
            depths[k] = depth_runs(self._depths[:, e]) if has_layers else None
            nbytes[k] = self.bytes_by_expert[e]
        if self.reads.all() and not any(depths):
            return replace(self.tensor, stand_in=self.stand_in, norm=norm)
        reads: list[Ranges | None] = [None] * len(self.tensor.inputs)
        for e, k in enumerate(self.experts):
            reads[k] = None if self._runs[e] == ((0, len(self.cost)),) else self._runs[e]
        operation = self.tensor.operation
        if isinstance(operation, Copy) and self.tensor.dtype.is_float and self._base_info.dtype != self.tensor.dtype:
            # What stands in has to be converted on its way.
            operation = WeightedSum((1.0,), normalize=False)
        return replace(
            self.tensor,
            operation=operation,
            reads=tuple(reads),
            depths=tuple(depths) if any(self._has_layers()) else (),
            nbytes=tuple(nbytes) if any(self._has_layers()) else (),
            stand_in=self.stand_in,
            error=relative(self.lost, self.full) if self.contribution is not None else None,
            norm=norm,
        )


def no_stand_in(names: str, have: str) -> str:
    """What to say where blocks of some experts cannot be left out."""
    return (
        f"a budget needs to know what stands in for blocks that are not read, and {names} have {have};"
        " register the experts with --base, or name it with --base here"
    )


def _stand_in(plan: Plan, tensor: PlannedTensor, experts: Sequence[int]) -> InputTensor:
    """What omitted blocks of a tensor read as: the tensor of the base."""
    if isinstance(tensor.operation, DeltaSum | SelectedSum | Slerp) and 0 not in experts:
        stand_in = tensor.inputs[0]
    else:
        bases = {plan.models[tensor.inputs[k].model].base for k in experts}
        base = bases.pop()
        if bases or base is None:
            names = ", ".join(plan.models[tensor.inputs[k].model].name for k in experts)
            raise RecipeError(no_stand_in(names, "different bases" if bases else "no known base"))
        stand_in = InputTensor(base, tensor.inputs[experts[0]].tensor)
    for k in experts:
        if tensor.inputs[k].tensor != stand_in.tensor:
            raise RecipeError(
                f"a budget cannot weigh {tensor.inputs[k].tensor!r} of {plan.models[tensor.inputs[k].model].name}"
                f" against {stand_in.tensor!r}: give the models of a slice the same layer_range, or no budget"
            )
    return stand_in


def tensor_of(model: Model, name: str) -> TensorInfo:
    """What the header of a model says of a tensor that it has."""
    info = model.checkpoint.find(name)
    assert info is not None
    return info


def runs_of(reads: NDArray[np.bool_]) -> list[Ranges]:
    """The blocks that are read of each expert, as runs: `reads` is [blocks, experts]."""
    blocks, experts = reads.shape
    inside = np.zeros((experts, blocks + 2), bool)
    inside[:, 1:-1] = reads.T
    expert, edge = (x.tolist() for x in np.nonzero(inside[:, 1:] != inside[:, :-1]))
    runs: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    for e, first, end in zip(expert[::2], edge[::2], edge[1::2], strict=True):
        runs[e].append((first, end))
    return [tuple(own) for own in runs]


def depth_runs(depths: NDArray[np.int8]) -> Depths:
    """The blocks that are read to the same depth, as runs."""
    edges = [0, *(np.flatnonzero(depths[1:] != depths[:-1]) + 1).tolist(), len(depths)]
    return tuple((a, b, int(depths[a])) for a, b in pairwise(edges) if depths[a] > 0)
