"""Merges that were stopped: what they left, and outputs that appeared without the catalog knowing."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deltaworks.catalog.store import Catalog, Staged
from deltaworks.catalog.tidy import Waste
from deltaworks.checkpoints.partial import lock
from deltaworks.errors import DeltaworksError, OutputError, PlanError
from deltaworks.merging.manifest import MANIFEST, PLAN, read_manifest
from deltaworks.merging.owned_folder import OwnedFolder, identity


def enter_finished(catalog: Catalog) -> list[Path]:
    """Enter outputs that are whole, and whose merge was stopped before it could enter them.

    Returns:
        Their folders. Nothing is entered in a catalog that cannot be written.
    """
    if catalog.is_copy:
        return []
    entered = []
    for staged in catalog.stagings():
        with suppress(DeltaworksError, OSError):  # whatever is wrong with it, the next merge into it says
            if _is_published(staged) and not _is_held(staged.out):
                if os.path.lexists(staged.path):
                    with OwnedFolder(staged.path, replaced=staged.replaces) as replaced:
                        replaced.discard()
                enter(catalog, staged.out)
                entered.append(staged.out)
    return entered


def _is_published(staged: Staged) -> bool:
    """Whether the folder of a merge became its output."""
    if os.path.lexists(staged.path) and identity(staged.path) != staged.replaces:
        return False
    return bool(read_manifest(staged.out)["plan_digest"] == staged.plan_digest)


def enter(catalog: Catalog, out: Path) -> None:
    """Enter a snapshot that the catalog does not know.

    Raises:
        OutputError: the folder is not a snapshot.
        DeltaworksError: the catalog cannot be written.
    """
    from deltaworks.merging.plan import keep_plan, load_plan  # noqa: PLC0415  # slow to import, seldom needed

    manifest = read_manifest(out)
    with suppress(PlanError):  # it is in the folder all the same
        plan = load_plan(out / PLAN)
        if plan.digest == manifest["plan_digest"]:
            keep_plan(catalog, plan)
    catalog.save_snapshot(out, manifest["plan_digest"], manifest, (out / MANIFEST).stat().st_mtime)


def enter_verified(catalog: Catalog, out: Path) -> None:
    """Enter a snapshot that was verified, unless the catalog knows it or cannot be written."""
    out = out.resolve()
    digest = read_manifest(out)["plan_digest"]
    if not catalog.is_copy and not any(p == out and d == digest for p, d, *_ in catalog.snapshots()):
        with suppress(DeltaworksError):
            enter(catalog, out)


def find_unfinished(catalog: Catalog) -> list[Waste]:
    """What merges left that did not finish; those that are running are spared."""
    found = []
    for staged in catalog.stagings():
        try:
            with OwnedFolder(staged.path, create=False) as folder:
                if not folder.is_locked:  # on a file system without locks, the merge may be running
                    continue
                nbytes = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file() and not p.is_symlink())
        except (OutputError, OSError):  # gone, locked, or no longer ours
            continue
        found.append(Waste(staged.path, nbytes, f"left by a merge into {staged.out} that did not finish"))
    return found


def remove_unfinished(catalog: Catalog, waste: Sequence[Waste]) -> int:
    """Delete what `find_unfinished` found, and forget merges of which nothing is left; returns the bytes freed."""
    freed = 0
    for item in waste:
        # Another process may hold it, or have removed it, by now.
        with suppress(OutputError, FileNotFoundError), OwnedFolder(item.path, create=False) as folder:
            if not folder.is_locked:
                continue
            folder.discard()
            freed += item.nbytes
    for staged in catalog.stagings():
        if not os.path.lexists(staged.path):
            catalog.end_staging(staged.path)
    return freed


def _is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a folder; never on a file system without locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(fd)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
