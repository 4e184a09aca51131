"""What the catalog keeps and nobody needs any more."""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import untouched
from deltaworks.catalog.store import KEPT, Catalog
from deltaworks.errors import CatalogError

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)")


@dataclass(frozen=True, slots=True)
class Waste:
    """A file that can go: its path, its bytes, and why."""

    path: Path
    nbytes: int
    why: str


def find_waste(catalog: Catalog) -> list[Waste]:
    """Statistics and layers of models that are registered no longer, and what processes that died left half-written."""
    known = {m.fingerprint[:24] for m in catalog.models()}
    found = []
    for path in _files(catalog):
        partial = _PARTIAL.fullmatch(path.name)
        if partial is not None:
            if not _is_running(int(partial["process"])):
                found.append(_waste(path, "left half-written"))
        elif not known.issuperset(_owners(path)):
            found.append(_waste(path, "of a model that is registered no longer"))
    return found


def layers_of(catalog: Catalog, experts: Collection[Model]) -> list[Waste]:
    """The layers of some experts.

    Raises:
        CatalogError: the weight files of one are gone, so its layers are all there is of it.
    """
    found = []
    for expert in experts:
        files = [p for p in _files(catalog, ("layers",)) if _owners(p)[0] == expert.fingerprint[:24]]
        if files and not untouched(expert):
            raise CatalogError(
                f"the weight files of {expert.name} at {expert.path} are gone or have changed, so its layers are all"
                " there is of it; register the expert again first"
            )
        found += [_waste(p, f"layers of {expert.name}") for p in files]
    return found


def remove(waste: Collection[Waste]) -> int:
    """Delete; returns the bytes that were freed."""
    for item in waste:
        item.path.unlink(missing_ok=True)
    for folder in {f for item in waste for f in (*item.path.parents, item.path.with_suffix(KEPT))}:
        if folder.suffix == KEPT and folder.is_dir() and not any(p for p in folder.rglob("*") if not p.is_dir()):
            shutil.rmtree(folder)  # of empty folders
    return sum(item.nbytes for item in waste)


def _files(catalog: Catalog, folders: Sequence[str] = ("statistics", "layers")) -> Iterator[Path]:
    for folder in folders:
        if (catalog.path / folder).is_dir():
            for path in sorted((catalog.path / folder).iterdir()):
                # Beside layers, a folder of the expert's small files.
                yield from sorted(p for p in path.rglob("*") if not p.is_dir()) if path.is_dir() else (path,)


def _owners(path: Path) -> list[str]:
    """The starts of the fingerprints of the expert and the base that a file is of."""
    return next((p for p in path.parents if p.suffix == KEPT), path).stem.split("-")


def _waste(path: Path, why: str) -> Waste:
    return Waste(path, path.stat().st_size, why)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
