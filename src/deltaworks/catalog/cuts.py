"""Trim cuts, from the statistics alone."""

from collections.abc import Iterable

from deltaworks.catalog.histogram import Cut, Interval, pack_cut, place_cuts, unpack_cut
from deltaworks.catalog.models import Model
from deltaworks.catalog.statistics import read_statistics
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tables import read_cuts
from deltaworks.errors import CatalogError


def find_cuts(
    catalog: Catalog, expert: Model, base: Model, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], Cut | Interval]:
    """Where trims of the delta `expert` minus `base` fall; no weights are read.

    Cuts at whole percents stand in the statistics. Others are placed by the histograms of the blocks, once, and then
    remembered. A cut that falls between two bfloat16 numbers is known as an interval only; the merge finds its exact
    place while it reads.

    Args:
        catalog: must hold the analysis of this delta.
        expert: the fine-tuned model.
        base: the model it was tuned from.
        wanted: tensors, each with the number of elements to keep.

    Returns:
        The cut for each of `wanted`.

    Raises:
        CatalogError: the delta is not analyzed.
    """
    keys = list(dict.fromkeys(wanted))
    if not keys:
        return {}
    found = catalog.find_analysis(expert.fingerprint, base.fingerprint)
    if found is None:
        raise CatalogError(f"{expert.name} is not analyzed against {base.name}; run: deltaworks analyze {expert.name}")
    known = read_cuts(found[1]).find(keys)
    cuts = {key: unpack_cut(cut) for key, cut in zip(keys, known, strict=True) if cut is not None}
    if len(cuts) < len(keys):
        remembered = catalog.find_cuts(expert.fingerprint, base.fingerprint)
        cuts |= {key: unpack_cut(remembered[key]) for key in keys if key in remembered}
    missing: dict[str, list[int]] = {}
    for tensor, keep in keys:
        if (tensor, keep) not in cuts:
            missing.setdefault(tensor, []).append(keep)
    if missing:
        new: dict[tuple[str, int], Cut | Interval] = {}
        for statistics in read_statistics(found[1]):
            keeps = missing.get(statistics.name, [])
            histograms = [b.histogram for b in statistics.blocks]
            placed = place_cuts(statistics.total, histograms, statistics.block_size, statistics.elements, keeps)
            new |= {(statistics.name, keep): cut for keep, cut in zip(keeps, placed, strict=True)}
        catalog.save_cuts(expert.fingerprint, base.fingerprint, {key: pack_cut(cut) for key, cut in new.items()})
        cuts |= new
    return cuts
