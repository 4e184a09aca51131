"""What commands tell of models and the catalog, as plain data."""

from typing import Any

from deltaworks.catalog.models import Model
from deltaworks.catalog.store import Catalog
from deltaworks.merging.manifest import holds_snapshot


def model_facts(model: Model) -> dict[str, Any]:
    """A registered model: name, kind, sizes, element types, identity."""
    dtypes: dict[str, int] = {}
    for tensor in model.checkpoint.tensors.values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + tensor.count
    return {
        "name": model.name,
        "kind": model.kind.value,
        "base": model.base,
        "source": model.source,
        "path": str(model.path),
        "fingerprint": model.fingerprint,
        "parameters": model.checkpoint.count,
        "bytes": model.checkpoint.nbytes,
        "tensors": len(model.checkpoint.tensors),
        "files": len(model.checkpoint.shards),
        "dtypes": dtypes,
    }


def catalog_facts(catalog: Catalog) -> dict[str, Any]:
    """Everything in the catalog, a line each."""
    models = catalog.models()
    prints = {m.name: m.fingerprint for m in models}
    return {
        "catalog": str(catalog.path),
        "models": [
            model_facts(m)
            | {"present": m.path.is_dir()}
            | {"analyzed": m.base in prints and catalog.find_analysis(m.fingerprint, prints[m.base]) is not None}
            for m in models
        ],
        "snapshots": [
            {"path": str(path), "plan_digest": digest, "committed_at": when, "present": holds_snapshot(path)}
            for path, digest, _, when in catalog.snapshots()
        ],
    }


def analysis_facts(catalog: Catalog, model: Model) -> dict[str, Any] | None:
    """The summary of an expert's analysis against its registered base, and `layers_bytes`, None where there are none.

    None where it is not analyzed.
    """
    base = catalog.find(model.base) if model.base else None
    found = catalog.find_analysis(model.fingerprint, base.fingerprint) if base else None
    if base is None or found is None:
        return None
    layers = catalog.layers_file(model.fingerprint, base.fingerprint)
    return found[2] | {"layers_bytes": layers.stat().st_size if layers.is_file() else None}
