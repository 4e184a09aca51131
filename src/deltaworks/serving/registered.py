"""What the catalog has of a workload's adapters: where they lie, and which base model they are for."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.models import Kind, Model
from deltaworks.catalog.store import Catalog, default_path, is_catalog
from deltaworks.checkpoints.hub import HUB_ID


@dataclass(frozen=True)
class Registered:
    """What the catalog has of a workload's adapters.

    Attributes:
        paths: The folder or hub id of each, by its name.
        bases: Base models that each is known to be for, hub ids or folders, by its name; none where nothing is known.
    """

    paths: dict[str, str]
    bases: dict[str, set[str]]

    def notes(self, model: str) -> list[str]:
        """A note, if adapters are for another base model than the one that servers load.

        Args:
            model: That one. Models are told apart by the last part of their name or path: a folder may hold a copy.
        """
        other = [
            (name, min(bases))
            for name, bases in sorted(self.bases.items())
            if bases and _last(model) not in {_last(base) for base in bases}
        ]
        if not other:
            return []
        name, base = other[0]
        more = f", and {len(other) - 1:,} more for other models" if len(other) > 1 else ""
        note = (
            f"the catalog has {name} as an adapter for {base}{more}; the servers load {model}, where it will not work"
        )
        return [note]


def registered_adapters(catalog: Path | None, names: Collection[str]) -> Registered:
    """What a catalog has of the adapters with some names.

    Args:
        catalog: Its folder; None for the user's own.
        names: Of the adapters.
    """
    if not is_catalog(catalog or default_path()):
        return Registered({}, {})
    with Catalog.to_read(catalog) as opened:
        models = {model.name: model for model in opened.models()}
    adapters = [model for name, model in models.items() if model.kind == Kind.ADAPTER and name in names]
    paths = {model.name: _hub_id(model) or str(model.path) for model in adapters}
    bases = {}
    for model in adapters:
        declared = models.get(model.base or "")
        known = (model.checkpoint.config.get("base_model_name_or_path"), declared.source if declared else None)
        bases[model.name] = {base for base in known if isinstance(base, str) and base}
    return Registered(paths, bases)


def _hub_id(model: Model) -> str:
    """The hub id that servers can load a model by; empty if it is a local folder, or a revision other than the default.

    A relative path such as ``adapters/a`` looks like a hub id, so the folder decides: the hub's cache keeps
    ``org/name`` as ``models--org--name/snapshots/REVISION``. vLLM takes no revision of an adapter.
    """
    match = HUB_ID.fullmatch(model.source)
    if match is None or match["revision"] is not None or model.is_gone:
        return ""
    snapshots = model.path.parent
    is_cached = snapshots.name == "snapshots" and snapshots.parent.name == f"models--{match['repo'].replace('/', '--')}"
    return match["repo"] if is_cached else ""


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].casefold()
