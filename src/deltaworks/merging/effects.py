"""Merges that would succeed and change nothing, or mix what does not belong together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.distance import FAR_FROM_BASE, far_from
from deltaworks.catalog.models import Model
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.plan import Plan

_TENSORS = 16
_ELEMENTS = 4096
"""Of each of as many tensors, what is read to tell whether two models may be alike."""
_BLOCK = 1 << 20


class Sample:
    """Some elements of a model, from tensors that are spread over it; two models with the same tensors match.

    Args:
        model: its files are read here, unless they are gone.
    """

    def __init__(self, model: Model) -> None:
        floats = sorted(
            (t for t in model.checkpoint.tensors.values() if t.dtype.is_float and t.count), key=lambda t: t.name
        )
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self._stands_for: dict[str, float] = {}
        if model.is_gone:
            return
        with Source(model, ByteCounter()) as source:
            # Vectors, most of them scales of norms, are numbers of another size than those of matrices.
            for group in ([t for t in floats if len(t.shape) > 1], [t for t in floats if len(t.shape) <= 1]):
                chosen = group[:: max(1, len(group) // _TENSORS)][:_TENSORS]
                share = sum(t.count for t in group) / max(1, sum(t.count for t in chosen))
                for tensor in chosen:
                    first = (tensor.count - min(_ELEMENTS, tensor.count)) // 2 // 8 * 8
                    values = _read(source, tensor, first, min(_ELEMENTS, tensor.count - first))
                    self.tensors[tensor.name] = values
                    self._stands_for[tensor.name] = tensor.count / values.size * share

    @property
    def digest(self) -> str:
        """What two models have in common if they hold the same weights, in whatever files and element types."""
        hasher = blake3()
        for name, values in self.tensors.items():
            hasher.update(name.encode())
            with np.errstate(all="ignore"):
                hasher.update((values + np.float32(0)).tobytes())  # the two zeros are the same
        return hasher.hexdigest()

    def distance(self, base: "Sample") -> float | None:
        """The norm of the difference from a base, relative to that of the base; None where nothing can be compared."""
        common = [n for n, v in self.tensors.items() if n in base.tensors and base.tensors[n].shape == v.shape]
        delta = norm = 0.0
        with np.errstate(all="ignore"):  # NaN and infinity are told elsewhere
            for name in common:
                a, b = (sample.tensors[name].astype(np.float64) for sample in (self, base))
                delta += float(np.square(a - b).sum()) * self._stands_for[name]
                norm += float(np.square(b).sum()) * self._stands_for[name]
        return math.sqrt(delta / norm) if norm > 0 and math.isfinite(delta) and math.isfinite(norm) else None


def _read(source: Source, tensor: TensorInfo, first: int, count: int) -> NDArray[np.float32]:
    raw = np.empty(-(-tensor.dtype.nbytes(count) // 8) * 8, np.uint8)
    source.read(tensor, first, count, raw)
    return decode_reference(raw[: tensor.dtype.nbytes(count)], tensor.dtype)


def hold_the_same(one: Model, other: Model) -> bool:
    """Whether two models hold the same weights, element by element, in whatever files and element types."""
    if one.fingerprint == other.fingerprint:
        return True
    tensors, theirs = one.checkpoint.tensors, other.checkpoint.tensors
    if (
        one.is_gone
        or other.is_gone
        or {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in theirs.items()}
    ):
        return False
    with Source(one, ByteCounter()) as source, Source(other, ByteCounter()) as its:
        for name, tensor in tensors.items():
            for first in range(0, tensor.count, _BLOCK):
                count = min(_BLOCK, tensor.count - first)
                if not tensor.dtype.is_float or not theirs[name].dtype.is_float:
                    continue  # integers are copied, and no part of what is merged
                if not np.array_equal(_read(source, tensor, first, count), _read(its, theirs[name], first, count)):
                    return False
    return True


def find_alike(models: Mapping[str, Model], samples: Mapping[str, Sample]) -> list[list[str]]:
    """Groups of references of models that hold the same weights, of two or more each."""
    groups: list[list[str]] = []
    by_digest: dict[str, list[str]] = {}
    for reference in models:
        if samples[reference].tensors:
            by_digest.setdefault(samples[reference].digest, []).append(reference)
    for candidates in by_digest.values():
        own: list[list[str]] = []
        for reference in candidates:
            group = next((g for g in own if hold_the_same(models[g[0]], models[reference])), None)
            if group is None:
                own.append([reference])
            else:
                group.append(reference)
        groups += [g for g in own if len(g) > 1]
    return groups


class Compared:
    """The weights of the models of a recipe beside each other.

    Args:
        catalog: holds analyses.
        merged: the models that are merged, by reference.
        leader: reference of the base model, or of the first where there is none.
        bases: the reference of the base of each expert, as far as known.
        models: all models, by reference.
        reads: some elements may be read of models; otherwise their analyses tell.
    """

    def __init__(
        self,
        catalog: Catalog,
        merged: Mapping[str, Model],
        leader: str,
        bases: Mapping[str, str],
        models: Mapping[str, Model],
        *,
        reads: bool,
    ) -> None:
        self._catalog, self._merged, self._leader, self._bases, self._models = catalog, merged, leader, bases, models
        self._samples = {r: Sample(m) for r, m in merged.items()} if reads else {}
        self._groups = find_alike(merged, self._samples) if reads else self._analyzed_alike()

    def _summary(self, reference: str) -> tuple[Path, dict[str, Any]] | None:
        """The statistics of a model against its base; None where it is not analyzed."""
        model, base = self._merged[reference], self._base(reference)
        known = self._catalog.find_analysis(model.fingerprint, base.fingerprint) if base else None
        return known and known[1:]

    def _base(self, reference: str) -> Model | None:
        if reference in self._bases:
            return self._models[self._bases[reference]]
        name = self._merged[reference].base
        return self._catalog.find(name) if name else None

    def _analyzed_alike(self) -> list[list[str]]:
        """Groups of models that hold the same weights, as their fingerprints and analyses tell."""
        groups: dict[object, list[str]] = {}
        for reference, model in self._merged.items():
            known, base = self._summary(reference), self._bases.get(reference)
            key: object = model.fingerprint
            if known is not None and _is_zero_delta(known[1]) and base is not None and base in self._merged:
                key = self._merged[base].fingerprint
            elif known is not None:
                key = blake3(known[0].read_bytes()).hexdigest()
            groups.setdefault(key, []).append(reference)
        return [g for g in groups.values() if len(g) > 1]

    def alike_with(self, reference: str | None) -> frozenset[str]:
        """The other models that hold the same weights as one."""
        return frozenset(r for g in self._groups if reference in g for r in g if r != reference)

    def notes(self, *, has_base: bool) -> list[str]:
        """What there is to note; where the recipe has no base model, the models are told apart from the first."""
        notes = []
        base_group = self.alike_with(self._leader) if has_base else frozenset()
        base_name = self._merged[self._leader].name
        for reference, model in self._merged.items():
            if reference in base_group:
                notes.append(f"{model.name} holds the same weights as {base_name}, so its delta is 0")
        for group in self._groups:
            names = [self._merged[r].name for r in group]
            if len(names) > 1 and not (has_base and self._leader in group):
                count = "twice" if len(names) == 2 else f"{len(names)} times"
                notes.append(f"{', '.join(names[:-1])} and {names[-1]} hold the same weights, so these count {count}")
        for reference, model in self._merged.items():
            if reference == self._leader:
                continue
            known, base = self._summary(reference), self._base(reference)
            norm = known[1]["relative_norm"] if known else None
            if norm is None and self._samples:
                base = self._merged[self._leader]
                norm = self._samples[reference].distance(self._samples[self._leader])
            if base is not None and norm is not None and norm > FAR_FROM_BASE:
                notes.append(far_from(model.name, base.name, norm))
        return notes


def _is_zero_delta(summary: Mapping[str, Any]) -> bool:
    return bool(summary["elements"] > 0 and summary["zeros"] == summary["elements"])


@dataclass(frozen=True, slots=True)
class Effect:
    """What the models of a plan add to it: notes on those that add nothing, and why all of it is futile, if it is."""

    notes: tuple[str, ...]
    futile: str | None


def effect_of(plan: Plan, base: int | None, equal: frozenset[int]) -> Effect:
    """Find models that have no part in a merge.

    Args:
        plan: the plan.
        base: the place of the base model of the recipe; None where it has none.
        equal: places of the models that hold the same weights as the base.
    """
    if plan.method == "passthrough":
        return Effect((), None)
    tensors = [t for t in plan.tensors if not isinstance(t.operation, Copy)]
    idle = set[int]()
    for place, model in enumerate(plan.models):
        parts = [_takes_part(t.operation, k) for t in tensors for k, i in enumerate(t.inputs) if i.model == place]
        if parts and not any(parts) and model.role != "base" and place != base:
            idle.add(place)
    names = [plan.models[p].name for p in sorted(idle)]
    notes = [
        f"{name} has no part in the merge: its weight, or what else scales it, is 0 in every tensor" for name in names
    ]
    if tensors and all(_is_zero(t.operation) for t in tensors):
        return Effect(tuple(notes), "every weight is 0, so every element of the merge would be 0; give weights")
    if (
        base is not None
        and any(len(t.inputs) > 1 for t in tensors)  # the base alone may be meant
        and all(_is_base(t.operation, [i.model for i in t.inputs], base, equal) for t in tensors)
    ):
        name = plan.models[base].name
        return Effect(
            tuple(notes),
            f"the merge would be {name} itself, as every other model has no weight in it or holds the same weights;"
            " check the weights and the models of the recipe",
        )
    return Effect(tuple(notes), None)


def _takes_part(operation: Operation, k: int) -> bool:
    """Whether the output hangs on input `k` of an operation."""
    if isinstance(operation, WeightedSum):
        return operation.weights[k] != 0
    if isinstance(operation, Slerp):
        return operation.t != (0 if k else 1)
    if isinstance(operation, SelectedSum):
        return k == 0 or operation.topk > 0
    if isinstance(operation, DeltaSum) and k > 0:
        thinned = operation.sparsify is not Sparsify.NONE and operation.densities[k - 1] <= 0
        return operation.weights[k - 1] != 0 and operation.scale != 0 and not thinned
    return True


def _is_zero(operation: Operation) -> bool:
    return isinstance(operation, WeightedSum) and not any(operation.weights)


def _is_base(operation: Operation, places: Sequence[int], base: int, equal: frozenset[int]) -> bool:
    """Whether an operation gives the base back."""
    if base not in places:
        return False
    others = [p for k, p in enumerate(places) if p != base and _takes_part(operation, k)]
    if not all(p in equal for p in others):
        return False
    return not isinstance(operation, WeightedSum) or math.isclose(sum(operation.weights) / operation.divisor, 1.0)
