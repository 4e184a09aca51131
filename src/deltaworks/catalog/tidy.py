"""What the catalog keeps and nobody needs any more."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import untouched
from deltaworks.catalog.store import KEPT, Catalog
from deltaworks.checkpoints.partial import is_abandoned, is_partial
from deltaworks.errors import CatalogError

_OWN = re.compile(r"\.?[0-9a-f]{1,24}-[0-9a-f]{1,24}|\..+\.(?:parquet|table|layers)\.\d")
"""What names of files begin with that the catalog writes: the fingerprints of an expert and its base; and what the
names of files look like that are on their way to such a name."""


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
        if is_partial(path):
            if is_abandoned(path):
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
    kept = {f for item in waste for f in (_kept_folder(item.path), item.path.with_suffix(KEPT)) if f is not None}
    for folder in kept:
        if folder.is_dir() and not folder.is_symlink():
            for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                _remove_empty(path)
            _remove_empty(folder)
    return sum(item.nbytes for item in waste)


def _remove_empty(folder: Path) -> None:
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _files(catalog: Catalog, folders: Sequence[str] = ("statistics", "layers")) -> Iterator[Path]:
    """The files that the catalog put into some of its folders; what anybody else put there is left alone."""
    for folder in folders:
        if (catalog.path / folder).is_dir():
            for path in sorted((catalog.path / folder).iterdir()):
                if path.is_symlink() or _OWN.match(path.name) is None:
                    continue
                if not path.is_dir():
                    yield path
                elif path.suffix == KEPT:  # beside layers, a folder of the expert's small files
                    yield from sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())


def _kept_folder(path: Path) -> Path | None:
    """The folder of an expert's small files that holds a file, if it is one of those."""
    return next((p for p in path.parents if p.suffix == KEPT and _OWN.match(p.name)), None)


def _owners(path: Path) -> list[str]:
    """The starts of the fingerprints of the expert and the base that a file is of."""
    return (_kept_folder(path) or path).stem.split("-")


def _waste(path: Path, why: str) -> Waste:
    return Waste(path, path.lstat().st_size, why)
