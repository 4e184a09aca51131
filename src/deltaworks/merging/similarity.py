"""Compare the weights of a recipe's models: which hold the same weights, and which are too far apart to be merged.

Where the catalog has analyses of all models against one base, these answer and no model is read. Elsewhere a sample of
each model is read, unless there is a budget.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

_TENSORS = 16
"""The most matrices, and the most vectors, that a sample takes elements from."""
_ELEMENTS = 4096
"""The most elements of each."""


class Sample:
    """Some elements of a model, from tensors that are spread over it; models with the same tensors give the same ones.

    A model that has no more elements than a sample is read whole.

    Args:
        model: its files are read here, unless they are gone.
        counter: every byte read is added to it.

    Attributes:
        tensors: float32; the elements of each sampled tensor, by its name.
        is_whole: whether these are all floats of the model.
    """

    def __init__(self, model: Model, counter: ByteCounter) -> None:
        floats = sorted(
            (t for t in model.checkpoint.tensors.values() if t.dtype.is_float and t.count), key=lambda t: t.name
        )
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self._stands_for: dict[str, float] = {}
        self._shapes = {t.name: t.shape for t in floats}
        self.is_whole = not model.is_gone and sum(t.count for t in floats) <= 2 * _TENSORS * _ELEMENTS
        if model.is_gone:
            return
        with Source(model, counter) as source:
            # Elements of vectors, most of them scales of norms, differ in size from those of matrices.
            for group in ([t for t in floats if len(t.shape) > 1], [t for t in floats if len(t.shape) <= 1]):
                chosen = group if self.is_whole else group[:: max(1, len(group) // _TENSORS)][:_TENSORS]
                share = sum(t.count for t in group) / max(1, sum(t.count for t in chosen))
                for tensor in chosen:
                    count = tensor.count if self.is_whole else min(_ELEMENTS, tensor.count)
                    values = _read(source, tensor, (tensor.count - count) // 2 // 8 * 8, count)
                    self.tensors[tensor.name] = values
                    self._stands_for[tensor.name] = tensor.count / values.size * share

    @cached_property
    def digest(self) -> str | None:
        """A hash of names, shapes and sampled values, equal for models with the same weights in any element types.

        None where nothing was read, or where the sample holds NaN or infinity.
        """
        if not self.tensors or not all(np.isfinite(values).all() for values in self.tensors.values()):
            return None
        hasher = blake3(repr(sorted(self._shapes.items())).encode())
        for values in self.tensors.values():
            hasher.update((values + np.float32(0)).view(np.uint8).data)  # negative zero becomes zero
        return hasher.hexdigest()

    def distance(self, base: "Sample") -> float | None:
        """The norm of the difference from a base, relative to that of the base; None where nothing can be compared."""
        common = [n for n, v in self.tensors.items() if n in base.tensors and base.tensors[n].shape == v.shape]
        delta = norm = 0.0
        with np.errstate(all="ignore"):  # NaN and infinity are reported elsewhere
            for name in common:
                a, b = (sample.tensors[name].astype(np.float64) for sample in (self, base))
                delta += float(np.square(a - b).sum()) * self._stands_for[name]
                norm += float(np.square(b).sum()) * self._stands_for[name]
        return math.sqrt(delta / norm) if norm > 0 and math.isfinite(delta) and math.isfinite(norm) else None


def _read(source: Source, tensor: TensorInfo, first: int, count: int) -> NDArray[np.float32]:
    raw = np.empty(-(-tensor.dtype.nbytes(count) // 8) * 8, np.uint8)
    source.read(tensor, first, count, raw)
    return decode_reference(raw[: tensor.dtype.nbytes(count)], tensor.dtype)


@dataclass(frozen=True, slots=True)
class _Analysis:
    """What the catalog knows of the delta of a model: the base's fingerprint, the statistics file, and its summary."""

    base: str
    file: Path
    block_size: int
    summary: Mapping[str, Any]

    @property
    def is_zero(self) -> bool:
        """Whether the model holds the same weights as the base."""
        return bool(self.summary["elements"] > 0 and self.summary["zeros"] == self.summary["elements"])

    @property
    def outline(self) -> tuple[Hashable, ...]:
        """What models with the same weights have in common, at the least."""
        found = self.summary
        return self.base, self.block_size, found["elements"], found["zeros"], found["relative_norm"]


class Comparison:
    """The weights of the models of a recipe beside each other.

    Args:
        catalog: holds analyses.
        merged: the models that are merged, by reference.
        leader: reference of the base model, or of the first where there is none.
        bases: the reference of the base of each expert, as far as known.
        models: all models, by reference.
        counter: counts what is read of the models; None where nothing may be read.
    """

    def __init__(
        self,
        catalog: Catalog,
        merged: Mapping[str, Model],
        leader: str,
        bases: Mapping[str, str],
        models: Mapping[str, Model],
        *,
        counter: ByteCounter | None,
    ) -> None:
        self._merged, self._leader = merged, leader
        self._bases = _bases(catalog, merged, bases, models)
        self._analyses: dict[str, _Analysis] = {}
        for reference, base in self._bases.items():
            if known := catalog.find_analysis(merged[reference].fingerprint, base.fingerprint):
                block_size, file, summary = known
                self._analyses[reference] = _Analysis(base.fingerprint, file, block_size, summary)
        is_needed = counter is not None and not self._is_settled()
        self._samples = {r: Sample(m, counter) for r, m in merged.items()} if counter and is_needed else {}
        self._groups = self._equal()
        self._group_of = {r: i for i, group in enumerate(self._groups) for r in group}
        self._likely_groups = self._likely_equal()

    def _is_settled(self) -> bool:
        """Whether analyses against one base answer for all models."""
        against = [
            {m.fingerprint, *([self._analyses[r].base] if r in self._analyses else [])} for r, m in self._merged.items()
        ]
        return bool(set.intersection(*against))

    def _equal(self) -> list[list[str]]:
        """Groups of models that are known to hold the same weights."""
        keys: dict[str, list[Hashable]] = {r: [("file", m.fingerprint)] for r, m in self._merged.items()}
        outlines: dict[Hashable, list[str]] = {}
        for reference, analysis in self._analyses.items():
            if analysis.is_zero:
                keys[reference].append(("file", analysis.base))
            else:
                outlines.setdefault(analysis.outline, []).append(reference)
        for outline, references in outlines.items():
            for reference in references if len(references) > 1 else ():
                keys[reference].append((outline, _digest(self._analyses[reference].file)))
        for reference, sample in self._samples.items():
            if sample.is_whole and sample.digest is not None:
                keys[reference].append(("whole", sample.digest))
        return _grouped(keys)

    def _likely_equal(self) -> list[list[str]]:
        """Groups of models that probably hold the same weights, the leader first; one of each group of equal ones."""
        by_digest: dict[str, list[str]] = {}
        for reference in sorted(self._samples, key=lambda r: r != self._leader):
            digest = self._samples[reference].digest
            if digest is not None and not self._samples[reference].is_whole:
                group = by_digest.setdefault(digest, [])
                if not any(self._is_known(reference, other) for other in group):
                    group.append(reference)
        return [group for group in by_digest.values() if len(group) > 1]

    def _is_known(self, one: str, other: str) -> bool:
        """Whether two models are known to hold the same weights, or known not to."""
        if one in self._group_of and self._group_of[one] == self._group_of.get(other):
            return True
        first, second = self._analyses.get(one), self._analyses.get(other)
        return bool(
            (first and second and first.base == second.base)
            or (first and first.base == self._merged[other].fingerprint)
            or (second and second.base == self._merged[one].fingerprint)
        )

    @property
    def groups(self) -> tuple[frozenset[str], ...]:
        """Groups of models that are known to hold the same weights, two or more in each, by reference."""
        return tuple(frozenset(group) for group in self._groups if len(group) > 1)

    def equal_to(self, reference: str | None) -> frozenset[str]:
        """The other models that are known to hold the same weights as one."""
        return frozenset(r for g in self._groups if reference in g for r in g if r != reference)

    def notes(self, *, has_base: bool) -> list[str]:
        """What the user should know; where the recipe has no base model, models are compared with the first one."""
        notes = []
        base = self._leader if has_base else None
        equal, base_name = self.equal_to(base), self._merged[self._leader].name
        likely = {r for g in self._likely_groups if base == g[0] for r in g[1:]}
        for reference, model in self._merged.items():
            if reference in equal:
                notes.append(f"{model.name} holds the same weights as {base_name}, so its delta is 0")
            elif reference in likely:
                notes.append(
                    f"{model.name} probably holds the same weights as {base_name}, so its delta is 0: sampled elements"
                    " are equal"
                )
        notes += [self._counted(g, "hold") for g in self._groups if base not in g]
        notes += [
            f"{self._counted(g, 'probably hold')}: sampled elements are equal"
            for g in self._likely_groups
            if base not in g
        ]
        for reference, model in self._merged.items():
            if reference == self._leader:
                continue
            analysis = self._analyses.get(reference)
            against = self._bases.get(reference)
            norm = analysis.summary["relative_norm"] if analysis else None
            if norm is None and self._samples:
                against = self._merged[self._leader]
                norm = self._samples[reference].distance(self._samples[self._leader])
            if against is not None and norm is not None and norm > FAR_FROM_BASE:
                notes.append(far_from(model.name, against.name, norm))
        return notes

    def _counted(self, group: Sequence[str], hold: str) -> str:
        names = [self._merged[r].name for r in group]
        return f"{', '.join(names[:-1])} and {names[-1]} {hold} the same weights, so their weights in the merge add up"


def _bases(
    catalog: Catalog, merged: Mapping[str, Model], bases: Mapping[str, str], models: Mapping[str, Model]
) -> dict[str, Model]:
    """The base of each model, as the recipe or else the catalog has it."""
    registered: dict[str, Model | None] = {}
    found = {}
    for reference, model in merged.items():
        if reference in bases:
            found[reference] = models[bases[reference]]
        elif model.base:
            if model.base not in registered:
                registered[model.base] = catalog.find(model.base)
            if (base := registered[model.base]) is not None:
                found[reference] = base
    return found


def _digest(statistics: Path) -> str:
    """A digest of what a statistics file holds, of which equal deltas have the same."""
    from deltaworks.catalog.statistics_file import stored_digest  # noqa: PLC0415  # slow to import, seldom needed

    return stored_digest(statistics) or blake3(statistics.read_bytes()).hexdigest()


def _grouped(keys: Mapping[str, Iterable[Hashable]]) -> list[list[str]]:
    """Groups of two or more references that are linked by keys they share, in the order of `keys`."""
    group_of: dict[str, int] = {}
    holder: dict[Hashable, str] = {}
    for number, (reference, own) in enumerate(keys.items()):
        group_of[reference] = number
        for key in own:
            if (other := holder.setdefault(key, reference)) != reference:
                merged, into = group_of[reference], group_of[other]
                group_of |= {r: into for r, n in group_of.items() if n == merged}
    groups: dict[int, list[str]] = {}
    for reference, number in group_of.items():
        groups.setdefault(number, []).append(reference)
    return [g for g in groups.values() if len(g) > 1]
