"""Plans and snapshots wherever they are: a file, an output folder, the catalog."""

from pathlib import Path
from typing import Any

from deltaworks.catalog.store import Catalog
from deltaworks.documents import parse_json
from deltaworks.errors import PlanError
from deltaworks.merging.manifest import MANIFEST, PLAN, holds_snapshot, read_manifest
from deltaworks.merging.plan import Plan, load_plan


def find_plan(catalog: Catalog, what: str) -> Plan:
    """The plan that `what` names: a plan file, a merged model's folder, or the first characters of a digest.

    Raises:
        PlanError: it names none, or more than one.
    """
    path = Path(what)
    if (path / MANIFEST).is_file():
        return load_plan(path / PLAN)
    if path.is_file():
        return load_plan(path)
    found = plan_of_digest(catalog, what)
    if found is None:
        raise PlanError(f"{what!r} is not a plan file, a merged model, or the digest of a plan in {catalog.path}")
    return found


def plan_of_digest(catalog: Catalog, digest: str) -> Plan | None:
    """The plan in the catalog whose digest begins with `digest`, of four hexadecimal digits or more; None if none does.

    Raises:
        PlanError: several do, or it is not a plan of this version.
    """
    known = len(digest) >= 4 and all(c in "0123456789abcdef" for c in digest)
    found = catalog.find_plans(digest) if known else []
    if len(found) > 1:
        raise PlanError(f"{digest!r} is the beginning of {len(found)} plans' digests; give more of it")
    if not found:
        return None
    where = f"a plan in {catalog.database}"
    return Plan.from_json(parse_json(found[0], where, "a plan", PlanError, finite=False))


def find_snapshot(catalog: Catalog, what: str) -> tuple[Path, dict[str, Any], str | None] | None:
    """Path, manifest and time of the merged model in the folder `what`; None where it is not a merged model.

    One that was moved or copied has no time; one that was deleted is still known by its former path.
    """
    path = Path(what).resolve()
    known = {p: (m, t) for p, _, m, t in catalog.snapshots()}
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        same = path in known and known[path][0]["plan_digest"] == manifest["plan_digest"]
        return path, manifest, known[path][1] if same else None
    return (path, *known[path]) if path in known and not holds_snapshot(path) else None
