"""From a plan that reads everything to one that reads the best for the bytes allowed: pure functions of statistics."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import numpy as np

from deltaworks.catalog.statistics import DEFAULT_BLOCK_SIZE
from deltaworks.checkpoints.sketch import BUCKETS
from deltaworks.errors import UserError
from deltaworks.merging.candidate import Candidate, Knowledge, relative, tensor_of
from deltaworks.merging.contributions import Overlapping
from deltaworks.merging.layered import UNTOLD, pool_cosines
from deltaworks.merging.plan import Plan
from deltaworks.merging.selection import Ranking, choose

LARGE_REQUEST = 1 << 20
"""Bytes from which on the price of a request decides in which runs blocks are read."""

_SURE = 6.0


class Weighed:
    """A plan that reads everything, with what each block adds; plans within any budget cost milliseconds.

    Args:
        plan: the plan.
        knowledge: what the catalog knows of its inputs.
        fair: weigh each expert's delta by what it adds itself, so that experts with small deltas are not starved.
        balanced: weigh each tensor's part of the merge by what it is itself, so that none is left behind.

    Raises:
        RecipeError: an expert's base is not known, or is not the same tensor.
        UserError: experts were analyzed in blocks of different size.
    """

    def __init__(self, plan: Plan, knowledge: Knowledge, *, fair: bool = False, balanced: bool = False) -> None:
        self._plan, self._knowledge, self._fair, self._balanced = plan, knowledge, fair, balanced
        self._block_size = _common_block_size(knowledge)
        self._candidates = [Candidate(plan, t, knowledge, self._block_size) for t in plan.tensors]
        self._weighed = [c for c in self._candidates if c.experts]
        cost = knowledge.read_cost
        # Where a request costs as much as a large read, blocks are chosen in runs that are worth one.
        self._request = int(cost.request_bytes) if cost.request_bytes >= LARGE_REQUEST else 0
        for candidate in self._weighed:
            candidate.weigh(knowledge.overlaps)
        self._counts_untold = [c.adds_layers and not fair for c in self._weighed]
        # What is chosen for another goal than the error is chosen so that more budget still leaves no more of it.
        self._is_account = not (fair or balanced or any(self._counts_untold))

    @cached_property
    def _rankings(self) -> list[Ranking]:
        """What there is to choose from, of each tensor; a budget that covers everything asks for none."""
        weighed = self._weighed
        adding = [(c, c.menu) for c in weighed if c.menu is not None and c.adds_layers]
        cosines = pool_cosines([(menu, c.places) for c, menu in adding])
        for (candidate, menu), own in zip(adding, cosines, strict=True):
            candidate.weigh_layers(menu, own)
        shares = _fair_shares(self._plan, weighed) if self._fair else None
        # Only layers make work of it that is worth threads.
        has_layers = any(c.menu for c in weighed)
        with ThreadPoolExecutor() as pool:
            rankings = list((pool.map if has_layers else map)(lambda c: c.rank(shares, self._request), weighed))
        if any(self._counts_untold):
            rankings = [
                r if own else r.scaled(1 + UNTOLD) for r, own in zip(rankings, self._counts_untold, strict=True)
            ]
        if self._balanced:
            rankings = [r.scaled(1 / c.full if c.full > 0 else 1.0) for r, c in zip(rankings, weighed, strict=True)]
        return rankings

    def within(self, budget_bytes: int) -> Plan:
        """The plan that reads at most `budget_bytes` of experts, and loses least by it, as UNTOLD counts it.

        A pure function: no I/O, clock or randomness. The result is the same merge with some blocks read as the base's.
        """
        plan, weighed, cost = self._plan, self._weighed, self._knowledge.read_cost
        if sum(c.whole_bytes for c in weighed) <= budget_bytes:
            chosen = [c.everything(self._request) for c in weighed]
        else:
            chosen = choose(self._rankings, budget_bytes, nested=not self._is_account)
        for candidate, choice in zip(weighed, chosen, strict=True):
            candidate.settle(choice, self._request, is_account=self._is_account)
        lost, full = (math.fsum(getattr(c, what) for c in weighed) for what in ("lost", "full"))
        nbytes = sum(sum(c.bytes_by_expert) for c in weighed)
        assert nbytes <= budget_bytes, "the planner chose more than the budget"
        of_model = [0] * len(plan.models)
        for candidate in weighed:
            for k, own in zip(candidate.experts, candidate.bytes_by_expert, strict=True):
                of_model[candidate.tensor.inputs[k].model] += own
        return replace(
            plan,
            models=tuple(m._replace(bytes_planned=n) for m, n in zip(plan.models, of_model, strict=True)),
            tensors=tuple(c.planned() for c in self._candidates),
            expert_bytes_planned=nbytes,
            budget_bytes=budget_bytes,
            block_size=self._block_size,
            predicted_error=relative(lost, full),
            error_bound=_bound(weighed, full),
            fair=self._fair,
            balanced=self._balanced,
            read_cost=(cost.request_s, cost.bytes_per_s),
            predicted_read_s=_seconds(plan, self._candidates, self._knowledge, nbytes),
        )

    def changes_without(self) -> dict[int, float]:
        """By how much the merge would change, relative to its distance from the base, if an expert read as the base.

        Returns:
            By the place in the plan of each expert that statistics are known of.
        """
        squares: dict[int, float] = {}
        for candidate in self._weighed:
            if candidate.contribution is None:
                continue
            reads = candidate.planned_reads()
            for e, k in enumerate(candidate.experts):
                place = candidate.tensor.inputs[k].model
                squares[place] = squares.get(place, 0.0) + candidate.contribution.without(reads, e)
        full = math.fsum(c.full for c in self._weighed)
        return {place: relative(square, full) for place, square in squares.items()}


def _common_block_size(knowledge: Knowledge) -> int:
    sizes = {table.block_size: place for (place, _), table in knowledge.deltas.items()}
    if len(sizes) > 1:
        (a, one), (b, other), *_ = sorted(sizes.items())
        names = [knowledge.models[i].name for i in (one, other)]
        raise UserError(
            f"{names[0]} was analyzed in blocks of {a} elements and {names[1]} in blocks of {b};"
            f" analyze both alike: deltaworks analyze {' '.join(names)} --force --block-size {b}"
        )
    return next(iter(sizes), DEFAULT_BLOCK_SIZE)


def _fair_shares(plan: Plan, candidates: Sequence[Candidate]) -> dict[int, float]:
    shares = dict.fromkeys(range(len(plan.models)), 0.0)
    for candidate in candidates:
        for e, k in enumerate(candidate.experts):
            if candidate.contribution is not None:
                shares[candidate.tensor.inputs[k].model] += float(candidate.contribution.energies()[:, e].sum())
    return shares


def _bound(candidates: Sequence[Candidate], full: float) -> float | None:
    """What the relative error cannot exceed: the omitted blocks' norms, as if all pulled in one direction.

    The numerator is the triangle inequality on exact norms. The full merge's own norm is exact where a tensor has one
    expert; else it is known from sketches, and taken six standard deviations below its estimate.
    """
    if not all(c.is_fixed or c.is_exact() for c in candidates):
        return None
    most = math.fsum(c.omitted_norm() for c in candidates)
    if most == 0:
        return 0.0
    # A sketch's squared length has a relative variance of 2 / BUCKETS in each block.
    grams = [c.contribution.gram for c in candidates if isinstance(c.contribution, Overlapping) and len(c.experts) > 1]
    estimated = [np.abs(gram.sum(axis=(1, 2))) for gram in grams]
    deviation = math.sqrt(math.fsum(float(np.square(e).sum()) * 2 / BUCKETS for e in estimated))
    least = full - _SURE * deviation
    return float(f"{math.sqrt(most / least) * (1 + 1e-5):.6g}") if least > 0 else None


def _seconds(plan: Plan, candidates: Sequence[Candidate], knowledge: Knowledge, nbytes: int) -> float:
    """Time to read `nbytes` of experts and what is needed of the base."""
    requests = sum(c.requests for c in candidates)
    for c in candidates:
        inputs = {i for i in c.tensor.inputs if plan.models[i.model].role == "base"}
        if c.stand_in is not None and not c.reads.all():
            inputs.add(c.stand_in)
        for source in inputs:
            info = tensor_of(knowledge.models[source.model], source.tensor)
            nbytes += info.nbytes
            requests += -(-info.count // DEFAULT_BLOCK_SIZE)
    return float(f"{knowledge.read_cost.seconds(requests, nbytes):.3g}")
