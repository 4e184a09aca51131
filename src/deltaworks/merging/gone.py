"""Merged models that the catalog records and whose folders are gone."""

from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.register import untouched
from deltaworks.catalog.store import Catalog
from deltaworks.merging.manifest import holds_snapshot


@dataclass(frozen=True, slots=True)
class Gone:
    """A recorded merged model whose folder is gone.

    Attributes:
        path: its former folder.
        needed_by: a merged model that is there and was made from it, or the name of a registered model that is a copy
            of it; None where its record can go.
    """

    path: Path
    needed_by: str | None


def find_gone(catalog: Catalog) -> list[Gone]:
    """The recorded merged models whose folders are gone, oldest first, and what still needs their records.

    Raises:
        CatalogError: the row of a model or of a merged model is damaged.
    """
    rows = {path: manifest for path, _, manifest, _ in catalog.snapshots()}
    gone = {path for path in rows if not holds_snapshot(path)}
    if not gone:
        return []
    made_as = {m["fingerprint"]: path for path, m in rows.items() if path in gone and "fingerprint" in m}
    needed = {made_as[m.fingerprint]: m.name for m in catalog.models() if m.fingerprint in made_as and untouched(m)}
    waiting = [(path, str(path)) for path in rows if path not in gone] + list(needed.items())
    while waiting:
        path, name = waiting.pop()
        for source in rows[path]["inputs"]:
            found = made_as.get(source["fingerprint"])
            if found is not None and found not in needed:
                needed[found] = name
                waiting.append((found, name))
    return [Gone(path, needed.get(path)) for path in rows if path in gone]
