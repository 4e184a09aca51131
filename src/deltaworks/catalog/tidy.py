"""Find and delete files of the catalog that are no longer needed."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import untouched
from deltaworks.catalog.store import KEPT, Catalog
from deltaworks.checkpoints.partial import is_abandoned, is_partial, remove_abandoned
from deltaworks.errors import CatalogError

_PAIR = "[0-9a-f]{24}-[0-9a-f]{24}"
_OWN = re.compile(
    rf"{_PAIR}\.(?:parquet|table|layers|files)|\.{_PAIR}(?:-\d+)?\.(?:parquet|table|layers)\.\d+(?:-[0-9a-f]{{8}})?"
)
"""The names of all files and folders that the catalog makes: the fingerprints of an expert and its base, and an ending;
or the partial form of that, see `deltaworks.checkpoints.partial`."""

_UNREGISTERED = "of a model that is registered no longer"


@dataclass(frozen=True, slots=True)
class Waste:
    """A file that can go: its path, its bytes, and why."""

    path: Path
    nbytes: int
    why: str


def find_waste(catalog: Catalog, *, unregistered_layers: bool = False) -> list[Waste]:
    """Find statistics of models that are no longer registered, and partial files of processes that died.

    Statistics of a delta whose layers are kept stay as well: if the expert's weight files are gone, they cannot be
    measured again.

    Args:
        catalog: where to look.
        unregistered_layers: include what `find_unregistered_layers` finds.

    Raises:
        CatalogError: the row of a model is damaged.
    """
    known = {m.fingerprint[:24] for m in catalog.models()}
    found = find_unregistered_layers(catalog) if unregistered_layers else []
    going = {w.path for w in found}
    for path in _files(catalog):
        if is_partial(path):
            if is_abandoned(path):
                found.append(_waste(path, "left half-written"))
        elif path.parent.name == "statistics" and not known.issuperset(_owners(path)):
            layers = catalog.path / "layers" / f"{path.stem}.layers"
            if layers in going or not layers.is_file():
                found.append(_waste(path, _UNREGISTERED))
    return found


def find_unregistered_layers(catalog: Catalog) -> list[Waste]:
    """Find layers, and files kept beside them, whose expert or base is not registered.

    Where the weight files of that expert are gone, the layers are its last copy: its row may have been damaged and
    dropped. They are therefore removed only on request, and never while a registered expert depends on them.

    Raises:
        CatalogError: the row of a model is damaged.
    """
    known = {m.fingerprint[:24]: m for m in catalog.models()}
    found = []
    for path in _files(catalog, ("layers",)):
        owners = _owners(path)
        if is_partial(path) or known.keys() >= set(owners):
            continue
        expert = known.get(owners[0])
        if expert is None or untouched(expert):
            found.append(_waste(path, _UNREGISTERED))
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
    """Delete files that `find_waste` or `layers_of` found, but no partial file that is being written by now.

    Returns:
        The bytes that were freed.

    Raises:
        OSError: a file cannot be deleted.
    """
    freed = 0
    for item in waste:
        if is_partial(item.path):
            freed += item.nbytes * remove_abandoned(item.path)
        else:
            item.path.unlink(missing_ok=True)
            freed += item.nbytes
    kept = {f for item in waste for f in (_kept_folder(item.path), item.path.with_suffix(KEPT)) if f is not None}
    for folder in kept:
        if folder.is_dir() and not folder.is_symlink():
            for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                _remove_empty(path)
            _remove_empty(folder)
    return freed


def _remove_empty(folder: Path) -> None:
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _files(catalog: Catalog, folders: Sequence[str] = ("statistics", "layers")) -> Iterator[Path]:
    """The files that the catalog put into some of its folders; what anybody else put there is left alone."""
    for folder in folders:
        if (catalog.path / folder).is_dir():
            for path in sorted((catalog.path / folder).iterdir()):
                if path.is_symlink() or _OWN.fullmatch(path.name) is None:
                    continue
                if not path.is_dir():
                    yield path
                elif path.suffix == KEPT:  # beside layers, a folder of the expert's small files
                    yield from sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())


def _kept_folder(path: Path) -> Path | None:
    """The folder of an expert's small files that holds a file, if it is one of those."""
    return next((p for p in path.parents if p.suffix == KEPT and _OWN.fullmatch(p.name)), None)


def _owners(path: Path) -> list[str]:
    """The starts of the fingerprints of the expert and the base that a file is of."""
    return (_kept_folder(path) or path).stem.split("-")


def _waste(path: Path, why: str) -> Waste:
    return Waste(path, path.lstat().st_size, why)
