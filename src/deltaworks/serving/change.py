"""A placement for a workload that changed, moving as few adapters as can be: `deltaworks place --from OLD`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from deltaworks.errors import PlacementError
from deltaworks.serving import partition
from deltaworks.serving.arrays import F64
from deltaworks.serving.document import Recorded
from deltaworks.serving.judge import HOPELESS, Judge
from deltaworks.serving.parts import Part, cut
from deltaworks.serving.placement import Gpu, Placement, Told, check_feasible, place
from deltaworks.serving.profile import check_one_model
from deltaworks.wording import counted

_ROUNDS = 200
_MAX_TIMES = 2
"""A changed placement may have so many times the GPUs of a fresh one, besides those of the old placement."""
_HOT = 0.3
_NOT_MENDED = "the old placement could not be mended"
_START_AFRESH = "; make a new one without --from"


@dataclass(frozen=True)
class Change:
    """What became of an old placement.

    Attributes:
        placement: The new one.
        ids: Of its GPUs.
        moves: Each with ``adapter``, ``from``, ``to`` (lists of ids) and ``why``.
        fresh: What placing all anew would give.
    """

    placement: Placement
    ids: list[str]
    moves: list[dict[str, Any]]
    fresh: Placement


@dataclass
class _State:
    """Shares of adapters on GPUs, as they change.

    Attributes:
        ids: Of the GPUs.
        kinds: Their types.
        shares: Of adapters by place, a dictionary for each GPU.
        why: Why an adapter was last moved.
        most_gpus: The number of GPUs above which none is added.
    """

    ids: list[str]
    kinds: list[int]
    shares: list[dict[int, float]]
    why: dict[int, str] = field(default_factory=dict)
    most_gpus: int = 1

    def parts(self) -> list[Part]:
        """What each GPU serves."""
        return cut(((g, a, s) for g, own in enumerate(self.shares) for a, s in own.items()), len(self.ids))

    def move(self, adapter: int, source: int, target: int) -> None:
        """Move what a GPU serves of an adapter to another."""
        share = self.shares[source].pop(adapter)
        self.shares[target][adapter] = self.shares[target].get(adapter, 0.0) + share

    def copy(self) -> "_State":
        """Another that can be changed without changing this one."""
        return _State(
            list(self.ids), list(self.kinds), [dict(own) for own in self.shares], dict(self.why), self.most_gpus
        )


def change(judge: Judge, old: Recorded, prices: Sequence[float] | None = None, told: Told = lambda _: None) -> Change:
    """A placement for the judge's demand that keeps what it can of an old one.

    Args:
        judge: Of the new demand; its first profile is that of new GPUs.
        old: The old placement.
        prices: Of a GPU of each type; None to count GPUs.
        told: Is told what is being done.

    Raises:
        ImpossibleError: a single request on an idle GPU cannot do what is asked.
        PlacementError: the old GPUs are of a type that is not given, or the old placement cannot be mended within a
            bounded number of moves and GPUs.
        ProfileError: the old GPUs serve another base model.
    """
    check_feasible(judge, range(len(judge.profiles)))
    adapters = judge.demand.workload.adapters
    places = {adapter.name: i for i, adapter in enumerate(adapters)}
    names = [profile.name for profile in judge.profiles]
    missing = sorted({kind for _, kind, _, _ in old.gpus} - set(names))
    if missing:
        raise PlacementError(f"the old placement has GPUs of type {missing[0]}; give it with --profile as well")
    check_one_model([*(old.profiles[kind] for _, kind, _, _ in old.gpus), *judge.profiles])
    state = _State(
        [name for name, _, _, _ in old.gpus],
        [names.index(kind) for _, kind, _, _ in old.gpus],
        [{places[n]: s for n, s in own.items() if n in places} for _, _, own, _ in old.gpus],
    )
    before = state.copy()
    _gather(judge, state)
    # The fresh placement comes first: where none is possible it says so, and it bounds what mending may take.
    told("a fresh placement")
    fresh = place(judge, prices)
    state.most_gpus = len(state.ids) + _MAX_TIMES * len(fresh.gpus)
    weight = partition.weights(judge.traffic[0], judge.profiles[0], len(state.ids))
    told("GPUs that would starve")
    slots = _repair(judge, state, weight)
    new = set(range(len(adapters))) - {a for own in state.shares for a in own}
    told("new adapters")
    for adapter in sorted(new, key=lambda a: (-weight[a], a)):
        state.shares[_roomiest(judge, state, adapter, 1.0, crowd=True)][adapter] = 1.0
        state.why[adapter] = "it is new"
    if new:
        slots = _repair(judge, state, weight)
    told("GPUs that could be freed")
    slots = _shrink(judge, state, slots, len(fresh.gpus), weight)
    gpus = tuple(
        Gpu(kind, part, judge.polished(part, kind, own))
        for kind, part, own in zip(state.kinds, state.parts(), slots, strict=True)
        if part
    )
    ids = [name for name, own in zip(state.ids, state.shares, strict=True) if own]
    kept = Placement(gpus, fresh.lower_bound, fresh.price_bound, "kept")
    return Change(kept, ids, _moves(adapters, before, state), fresh)


def _moves(adapters: Any, before: _State, after: _State) -> list[dict[str, Any]]:
    found = []
    for index, adapter in enumerate(adapters):
        was = sorted(before.ids[g] for g, own in enumerate(before.shares) if index in own)
        now = sorted(after.ids[g] for g, own in enumerate(after.shares) if index in own)
        if was != now:
            found.append({"adapter": adapter.name, "from": was, "to": now, "why": after.why.get(index, "")})
    return found


def _strain(judge: Judge, state: _State, gpu: int) -> float:
    return judge.strain(tuple(sorted(state.parts()[gpu])), state.kinds[gpu])


def _strains(judge: Judge, state: _State, adapter: int, share: float, source: int | None = None) -> dict[int, float]:
    """The strain of each GPU that may take a share of an adapter, after it took it; see `_roomiest`.

    A share that moves whole may go to a GPU that serves another share of the adapter, and the two become one. A share
    that is split goes to a GPU that serves none: if the halves met again, splitting would lead nowhere.
    """
    splits = source is not None and share < state.shares[source][adapter]
    strains = {}
    for gpu, own in enumerate(state.shares):
        if gpu == source or (splits and adapter in own):
            continue
        trial = state.copy()
        trial.shares[gpu][adapter] = own.get(adapter, 0.0) + share
        if source is not None:
            trial.shares[source][adapter] -= share
            if not splits:
                del trial.shares[source][adapter]
        strains[gpu] = _strain(judge, trial, gpu)
    return strains


def _roomiest(
    judge: Judge, state: _State, adapter: int, share: float, source: int | None = None, *, crowd: bool = False
) -> int:
    """The GPU with the lowest strain after adding a share of an adapter, or a new GPU if all would starve.

    Args:
        judge: The judge of the new demand.
        state: The placement as it is.
        adapter: The adapter's place in the workload.
        share: The share of its requests that is added.
        source: The GPU that gives the share away; None if no GPU does.
        crowd: Whether to return the least strained GPU even if it would starve, instead of adding one. A GPU is added
            all the same if none has memory for the adapter.

    Raises:
        PlacementError: a GPU would have to be added, and there are `_State.most_gpus` already.
    """
    strains = _strains(judge, state, adapter, share, source)
    best = min(strains, key=lambda g: (strains[g], g), default=None)
    if best is None or strains[best] == float("inf") or (strains[best] > 1.0 and not crowd):
        return _new_gpu(judge, state, adapter)
    return best


def _new_gpu(judge: Judge, state: _State, adapter: int) -> int:
    """Add a GPU of the first type that has memory for an adapter; its place."""
    if len(state.ids) >= state.most_gpus:
        raise PlacementError(f"{_NOT_MENDED} with at most {counted(state.most_gpus, 'GPU')}{_START_AFRESH}")
    kinds = range(len(judge.profiles))
    kind = next((k for k in kinds if judge.has_memory(adapter, k)), 0)
    numbers = {int(i.rpartition("-")[2]) for i in state.ids if i.rpartition("-")[2].isdigit()}
    state.ids.append(f"gpu-{max(numbers, default=-1) + 1}")
    state.kinds.append(kind)
    state.shares.append({})
    return len(state.ids) - 1


def _merge(state: _State, adapter: int, gpu: int) -> bool:
    """Merge a GPU's share of an adapter with the largest that another GPU serves; whether there is another."""
    others = [g for g, own in enumerate(state.shares) if adapter in own and g != gpu]
    if not others:
        return False
    state.move(adapter, gpu, max(others, key=lambda g: (state.shares[g][adapter], -g)))
    state.why[adapter] = "it has too few requests to be split"
    return True


def _gather(judge: Judge, state: _State) -> None:
    """Merge shares of which less than one request is expected: the twin cannot try them."""
    requests = judge.traffic[0].rate * judge.traffic[0].duration_s
    for gpu, own in enumerate(state.shares):
        for adapter in [a for a, share in own.items() if requests[a] * share < 1.0]:
            _merge(state, adapter, gpu)


def _fits(judge: Judge, state: _State) -> list[int | None]:
    parts = state.parts()
    return list(judge.pool.map(judge.fits, parts, state.kinds))


def _repair(judge: Judge, state: _State, weight: F64) -> list[int]:
    """Move adapters from GPUs that the twin refuses until it accepts all; return the slots of each GPU.

    Raises:
        PlacementError: the moves lead back to a placement that was refused, or need too many rounds or GPUs.
    """
    refused_before: set[tuple[Part, ...]] = set()
    for _ in range(_ROUNDS):
        slots = _fits(judge, state)
        refused = [g for g, own in enumerate(slots) if own is None]
        if not refused:
            return [own or 1 for own in slots]
        parts = tuple(state.parts())
        if parts in refused_before:
            break
        refused_before.add(parts)
        for gpu in refused:
            own = state.shares[gpu]
            # Where no request comes, to split further would leave the twin still less to try.
            untried = any(judge.is_untried(parts[gpu], state.kinds[gpu], factor) for factor in judge.factors)
            if untried and sum([_merge(state, adapter, gpu) for adapter in list(own)]):
                continue
            if misfits := [a for a in own if not judge.has_memory(a, state.kinds[gpu])]:
                adapter = max(misfits, key=lambda a: (weight[a] * own[a], -a))
                state.move(adapter, gpu, _roomiest(judge, state, adapter, own[adapter], gpu))
            elif len(own) == 1:
                adapter = next(iter(own))
                target = _roomiest(judge, state, adapter, own[adapter] / 2, gpu)
                state.shares[target][adapter] = own[adapter] = own[adapter] / 2
            else:
                # The larger the adapter, the fewer must move; all but the largest may be too small to matter.
                adapter = max(own, key=lambda a: (weight[a] * own[a], -a))
                if weight[adapter] * own[adapter] > sum(weight[a] * s for a, s in own.items()) / 2:
                    adapter = sorted(own, key=lambda a: (weight[a] * own[a], -a))[-2]
                state.move(adapter, gpu, _roomiest(judge, state, adapter, own[adapter], gpu))
            state.why[adapter] = f"{state.ids[gpu]} would starve"
    raise PlacementError(f"{_NOT_MENDED}{_START_AFRESH}")


def _shrink(judge: Judge, state: _State, slots: list[int], enough: int, weight: F64) -> list[int]:
    """Empty GPUs while there are more than needed and the twin accepts the rest.

    Every step that is taken leaves one GPU less, so that it ends.
    """
    while len(state.ids) > enough:
        for gone, hot in product(_lightest(state, weight), (float("inf"), _HOT)):
            trial = _without(judge, state, gone, hot, weight)
            if trial is None or max(_strain(judge, trial, g) for g in range(len(trial.ids))) > HOPELESS:
                continue
            found = _fits(judge, trial)
            if None not in found:
                state.ids, state.kinds, state.shares, state.why = trial.ids, trial.kinds, trial.shares, trial.why
                slots = [own or 1 for own in found]
                break
        else:
            break
    return slots


def _lightest(state: _State, weight: F64) -> list[int]:
    """The GPU of the fewest adapters, and the one with the least to do if that is another."""
    gpus = range(len(state.ids))
    fewest = min(gpus, key=lambda g: (len(state.shares[g]), -g))
    idlest = min(gpus, key=lambda g: (sum(weight[a] * share for a, share in state.shares[g].items()), -g))
    return list(dict.fromkeys((fewest, idlest)))


def _without(judge: Judge, state: _State, gone: int, hot: float, weight: F64) -> _State | None:
    """The same with one GPU less; None if another has no memory for what it serves.

    Args:
        judge: Of the new demand.
        state: The placement as it is.
        gone: The GPU that is emptied and left out. All that it serves goes to GPUs that are there.
        hot: What is heavier than this share of a GPU is spread over the others.
        weight: Of the adapters, as shares of a GPU, (adapters,) float64.
    """
    trial = state.copy()
    for adapter, share in sorted(trial.shares[gone].items(), key=lambda item: (-weight[item[0]], item[0])):
        # What moved before keeps its reason: the GPU that is left out may be none of the old ones.
        trial.why.setdefault(adapter, f"it frees {trial.ids[gone]}")
        if weight[adapter] * share > hot:
            _spread(judge, trial, adapter, gone, weight)
            continue
        strains = _strains(judge, trial, adapter, share, gone)
        best = min(strains, key=lambda g: (strains[g], g))
        if strains[best] == float("inf"):
            return None
        trial.move(adapter, gone, best)
    for listed in (trial.ids, trial.kinds, trial.shares):
        del listed[gone]
    return trial


def _spread(judge: Judge, state: _State, adapter: int, source: int, weight: F64) -> None:
    """Spread a GPU's share of an adapter over the others, each up to the load that all would have if it were level."""
    share = state.shares[source].pop(adapter)
    load = np.array([sum(weight[a] * s for a, s in own.items()) for own in state.shares])
    load[source] = np.inf
    others = np.isfinite(load)
    level = (load[others].sum() + weight[adapter] * share) / others.sum()
    room = np.maximum(level - load, 0.0)
    # A piece that expects less than one request is not worth a server's slot; the roomiest get it.
    requests = judge.traffic[0].rate[adapter] * judge.traffic[0].duration_s * share
    room[(room < room.max()) & (requests * room < room.sum())] = 0.0
    for gpu in np.flatnonzero(room).tolist():
        piece = float(share * room[gpu] / room.sum())
        state.shares[gpu][adapter] = state.shares[gpu].get(adapter, 0.0) + piece
