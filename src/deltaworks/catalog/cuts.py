"""Trim cuts, from the statistics alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from deltaworks.catalog.histogram import Cut, Interval, pack_cut, place_cuts, unpack_cut
from deltaworks.catalog.models import Model
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tables import KnownCuts, read_table
from deltaworks.errors import CatalogError


def find_cuts(
    catalog: Catalog, expert: Model, base: Model, wanted: Sequence[tuple[str, int]], known: KnownCuts | None = None
) -> list[Cut | Interval]:
    """Where trims of the delta `expert` minus `base` fall; no weights are read.

    Cuts at whole percents stand in the statistics. Others are placed by the histograms of the blocks, once, and then
    remembered. A cut that falls between two bfloat16 numbers is known as an interval only; the merge finds its exact
    place while it reads.

    Args:
        catalog: must hold the analysis of this delta.
        expert: the fine-tuned model.
        base: the model it was tuned from.
        wanted: tensors, each with the number of elements to keep.
        known: the cuts in the statistics, where these are read already.

    Returns:
        The cut for each of `wanted`.

    Raises:
        CatalogError: the delta is not analyzed, or the statistics are damaged.
    """
    statistics = catalog.statistics_file(expert.fingerprint, base.fingerprint)
    if known is None:
        if catalog.find_analysis(expert.fingerprint, base.fingerprint) is None:
            raise CatalogError(
                f"{expert.name} is not analyzed against {base.name}; run: deltaworks analyze {expert.name}"
            )
        known = read_table(statistics).cuts
    found = known.find(tuple(wanted))
    missing = {key for key, cut in zip(wanted, found, strict=True) if cut is None}
    if not missing:
        return [unpack_cut(cut) for cut in found if cut is not None]
    remembered = catalog.find_cuts(expert.fingerprint, base.fingerprint)
    others = {key: unpack_cut(remembered[key]) for key in missing if key in remembered}
    if len(others) < len(missing):
        others |= _place(catalog, expert, base, statistics, missing - others.keys())
    return [others[key] if cut is None else unpack_cut(cut) for key, cut in zip(wanted, found, strict=True)]


def _place(
    catalog: Catalog, expert: Model, base: Model, file: Path, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], Cut | Interval]:
    """Place cuts by the histograms of the blocks, and remember them."""
    from deltaworks.catalog.statistics_file import read_statistics  # noqa: PLC0415  # slow to import, seldom needed

    keeps: dict[str, list[int]] = {}
    for tensor, keep in wanted:
        keeps.setdefault(tensor, []).append(keep)
    placed: dict[tuple[str, int], Cut | Interval] = {}
    for statistics in read_statistics(file):
        own = keeps.get(statistics.name, [])
        histograms = [b.histogram for b in statistics.blocks]
        cuts = place_cuts(statistics.total, histograms, statistics.block_size, statistics.elements, own)
        placed |= {(statistics.name, keep): cut for keep, cut in zip(own, cuts, strict=True)}
    catalog.save_cuts(expert.fingerprint, base.fingerprint, {key: pack_cut(cut) for key, cut in placed.items()})
    return placed
