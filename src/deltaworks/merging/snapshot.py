"""Snapshots: merged models that appear whole or not at all, and can be checked against their manifest."""

import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltaworks.catalog.fingerprint import combine, hash_file
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import untouched
from deltaworks.catalog.storage import is_far
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import copy_files, sidecar_names, write_chat_template, write_json
from deltaworks.checkpoints.weight_files import INDEX
from deltaworks.checkpoints.writer import ShardLayout, fsync_folder, storage_error
from deltaworks.errors import ChangedError, DeltaworksError, OutputError, PlanError
from deltaworks.merging.card import model_card
from deltaworks.merging.custom_code import code_names, write_code
from deltaworks.merging.execute import Reads, StageTimes, execute, output_shards
from deltaworks.merging.manifest import DIGEST, MANIFEST, MANIFEST_VERSION, PLAN, RECIPE, manifest_digest
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.owned_folder import JOURNAL, OwnedFolder, identity, staging_path
from deltaworks.merging.plan import Plan, keep_plan, save_plan
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.verify import verify as verify  # noqa: PLC0414  # offered here, beside run_plan
from deltaworks.outputs import check_apart
from deltaworks.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did.

    Attributes:
        output: the snapshot's folder.
        plan_digest: of the plan that made it.
        budget_bytes: the most that might be read from experts; None for no budget.
        expert_bytes: what all the experts hold.
        expert_bytes_planned: what the plan said would be read of them for one pass.
        expert_bytes_read: what was read of experts for the files of the output, by an interrupted run too; without a
            budget, methods that take two passes over a tensor read it twice.
        base_bytes_read: what this run read of base models, all passes together.
        sampled_bytes: what planning read of models to compare them, without a budget; 0 for a plan from a file.
        output_bytes_written: size of the weight files.
        predicted_error, error_bound: the plan's.
        measured_error: the real one, where it was measured.
        wall_s: seconds this run took.
        stages: where they went.
        notes: the plan's, and one where the output equals the base.
        equals_base: whether every merged element was found to be the base's; False where an interrupted run wrote a
            part of the files, or where the output has another element type.
    """

    output: str
    plan_digest: str
    budget_bytes: int | None
    expert_bytes: int
    expert_bytes_planned: int
    expert_bytes_read: int
    base_bytes_read: int
    sampled_bytes: int
    output_bytes_written: int
    predicted_error: float
    error_bound: float | None
    measured_error: float | None
    wall_s: float
    stages: StageTimes
    notes: tuple[str, ...] = ()
    equals_base: bool = False

    def to_json(self) -> dict[str, Any]:
        """As the command line prints it."""
        return asdict(self)


def check_output(out: Path, *, force: bool) -> None:
    """Make sure that a snapshot may appear at `out`.

    An empty folder may be there. A link to one is not replaced without `force`; with `force`, the link itself is
    replaced.

    Raises:
        OutputError: something is there, and `force` is not set.
    """
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not force and not is_empty:
        raise OutputError(f"{out} exists; choose another folder, or replace it with --force")


def layer_files(catalog: Catalog, plan: Plan, models: Sequence[Model], *, everywhere: bool | None) -> dict[int, Path]:
    """The files of layers that a plan reads, by the places of their experts in the plan.

    Args:
        catalog: holds them.
        plan: the plan.
        models: its models.
        everywhere: where the plan has no budget, read layers of every expert that has any; None for those on slow
            storage.

    Raises:
        PlanError: the plan reads layers that are gone.
    """
    needed = {t.inputs[r].model for t in plan.tensors for r, runs in enumerate(t.depths) if runs is not None}

    def wants(expert: Model) -> bool:
        return is_far(catalog, expert) if everywhere is None else everywhere

    needed |= {place for place, model in enumerate(models) if model.is_gone}
    files = {
        place: catalog.layers_file(expert.fingerprint, models[planned.base].fingerprint)
        for place, (expert, planned) in enumerate(zip(models, plan.models, strict=True))
        if planned.base is not None and (place in needed or (plan.budget_bytes is None and wants(expert)))
    }
    found = {place: path for place, path in files.items() if path.is_file()}
    if lacking := needed - found.keys():
        name = plan.models[min(lacking)].name
        raise PlanError(
            f"the plan reads layers of {name}, which the catalog does not have; build them with"
            f" deltaworks analyze {name} --layers, or plan again"
        )
    return found


def run_plan(
    catalog: Catalog,
    plan: Plan,
    models: Sequence[Model],
    out: Path,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    verify_error: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Execute `plan` and commit the result as the folder `out`.

    Everything is written to a hidden folder beside `out`, flushed, and renamed at the end. A run that was stopped
    leaves finished files there; running the same plan again takes them over.

    Args:
        catalog: remembers the snapshot.
        plan: what to do.
        models: the plan's models, in its order, unchanged.
        out: the folder to appear.
        options: how to execute; `shard_bytes` and `seed` are the plan's own.
        force: replace what is at `out`.
        verify_error: measure what the budget really cost; this reads every expert in full, uncounted.
        progress: told of the bytes read.

    Raises:
        OutputError: `out` exists, overlaps a model or the catalog, or another process is writing it.
        ChangedError: a model's files were touched meanwhile.
        DeltaworksError: the merge failed; `out` is untouched.
    """
    started = time.monotonic()
    options, progress = options or MergeOptions(), progress or Silent()
    out = Path(os.path.abspath(out))  # noqa: PTH100  # resolve() would follow a link that is to be replaced
    check_apart(out, [("the catalog", catalog.path), *(("the input", m.path) for m in models)])
    check_output(out, force=force)
    shards = output_shards(plan)
    sidecars = sidecar_names(models[plan.tokenizer].path)
    names = _companion_names(plan, sidecars, shards)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = _Staging(catalog, out, plan, [*names, *(s.name for s in shards)])
    except OSError as error:
        raise storage_error(staging_path(out), error) from error
    with staging:
        try:
            todo = [s for s in shards if not staging.take_over(s, progress)]
            _check_space(out, sum(s.nbytes for s in todo))
            layers = layer_files(catalog, plan, models, everywhere=options.layers)
            # First, so that a file that cannot be copied is reported before the weights are read.
            others = _write_companions(staging, plan, models, sidecars, shards)
            executed = execute(
                plan, models, todo, staging.folder, options, staging.reads, staging.record, progress, layers
            )
            if changed := next((m for m in models if not m.is_gone and not untouched(m)), None):
                staging.done.clear()
                raise ChangedError(
                    f"{changed.path} changed while it was being read; nothing was committed: merge again"
                )
            try:
                equals_base = executed.equals_base and len(todo) == len(shards)
                manifest = _write_manifest(staging, plan, shards, others, equals_base=equals_base)
                staging.publish(force=force)
            except OSError as error:
                raise storage_error(Path(error.filename or out), error) from error
        except DeltaworksError as error:
            raise type(error)(f"{error}{staging.give_up()}") from error
    try:
        catalog.save_snapshot(out, plan.digest, manifest)
    except DeltaworksError as error:
        raise DeltaworksError(
            f"{out} is complete, but {error}; fix that, then run `deltaworks verify {out}` to record it"
        ) from error
    notes = plan.notes
    if equals_base:
        bases = " and ".join(m.name for m in plan.models if m.role == "base")
        note = f"the output equals {bases}: every element is that of the base after rounding; check the weights"
        notes = (*notes, note)
        progress.note(note)
    measured = (
        measure_error(
            plan,
            models,
            options,
            layers=layer_files(catalog, plan, models, everywhere=False),
            spool=out.parent,
            progress=progress,
        ).relative
        if verify_error
        else None
    )
    return MergeResult(
        output=str(out),
        plan_digest=plan.digest,
        budget_bytes=plan.budget_bytes,
        expert_bytes=plan.expert_bytes,
        expert_bytes_planned=plan.expert_bytes_planned,
        expert_bytes_read=staging.reads.expert.value,
        base_bytes_read=staging.reads.base.value,
        sampled_bytes=plan.sampled_bytes,
        output_bytes_written=sum(s.nbytes for s in shards),
        predicted_error=plan.predicted_error,
        error_bound=plan.error_bound,
        measured_error=measured,
        notes=notes,
        equals_base=equals_base,
        wall_s=round(time.monotonic() - started, 3),
        stages=executed.stages,
    )


class _Staging:
    """The hidden folder in which one process builds a snapshot; its journal survives a crash.

    Args:
        catalog: records it, before it is made.
        out: the folder to appear.
        plan: the plan that is executed.
        names: of all files that will be written, but the manifest.

    Raises:
        OutputError: the folder was not created by deltaworks, or another process holds it.
        OSError: it cannot be made.
    """

    def __init__(self, catalog: Catalog, out: Path, plan: Plan, names: Sequence[str]) -> None:
        self.out, self.folder = out, staging_path(out)
        self._catalog, self._plan = catalog, plan.digest
        earlier = next((s for s in catalog.stagings() if s.path == self.folder), None)
        with catalog.transaction():
            keep_plan(catalog, plan)
            if earlier is None:  # otherwise it may be that of a run that is still writing
                catalog.begin_staging(self.folder, out, self._plan)
        self.reads = Reads(ByteCounter(plan.budget_bytes), ByteCounter())
        self.done: dict[str, str] = {}
        self._spent: dict[str, int] = {}
        self._owned = OwnedFolder(self.folder, replaced=earlier.replaces if earlier else None)
        try:
            journal = self._owned.journal
            if journal.get("plan") == self._plan:
                self.done, self._spent = dict(journal["shards"]), dict(journal["expert_bytes"])
            self._owned.clear(keep=self.done)
            catalog.begin_staging(self.folder, out, self._plan)
            self._claim([*names, MANIFEST])
        except BaseException:
            try:
                self.give_up()
            finally:
                self._owned.close()
            raise

    def _claim(self, names: Iterable[str] = ()) -> None:
        self._owned.claim(names, plan=self._plan, shards=self.done, expert_bytes=self._spent)

    def give_up(self) -> str:
        """Keep only what a later run can resume from.

        Returns:
            What to append to the message of the error that ends the merge.
        """
        if not self._owned.is_there():
            return f"; {self.out} is in place all the same, and the next command that meets it enters it in the catalog"
        if self.done:
            with suppress(OSError, DeltaworksError):  # the folder may be sealed already
                self._claim()
            return (
                f"; the files that are finished stay in {self.folder}: the same command resumes, and `deltaworks gc`"
                " removes them"
            )
        try:
            self._owned.discard()
        except OSError as error:
            return f"; {self.folder} stays ({error.strerror}): `deltaworks gc` removes it"
        with suppress(DeltaworksError):  # the error that is being reported matters more; `gc` forgets the folder
            self._catalog.end_staging(self.folder)
        return ""

    def take_over(self, shard: ShardLayout, progress: Progress) -> bool:
        """Whether an earlier run finished `shard`, and its file is still what was written.

        What went into it counts as read. What a run that was killed read for files it did not finish is lost: it is
        read again, and does not count against the budget of the run that finishes them.
        """
        path = self.folder / shard.name
        if shard.name not in self.done or not path.is_file() or path.stat().st_size != shard.nbytes:
            return False
        progress.start(f"check {shard.name} of an earlier run", shard.nbytes)
        intact = hash_file(path, ByteCounter(), progress) == self.done[shard.name]
        progress.finish()
        if intact:
            self.reads.expert.reserve(self._spent[shard.name])
            self.reads.expert.add(self._spent[shard.name])
        return intact

    def record(self, shard: ShardLayout, digest: str, expert_bytes: int) -> None:
        """Note in the journal that `shard` is complete and flushed.

        Raises:
            DeltaworksError: the journal cannot be written.
        """
        self.done[shard.name], self._spent[shard.name] = digest, expert_bytes
        try:
            self._claim()
        except OSError as error:
            raise storage_error(self.folder / JOURNAL, error) from error

    def publish(self, *, force: bool) -> None:
        """Flush the folder and give it its name.

        Raises:
            OutputError: something else stands there by now.
            OSError: it cannot be renamed.
        """
        if unclaimed := self._owned.seal():
            raise OutputError(f"{self.folder} holds {unclaimed[0]}, which this merge did not write; move it away")
        check_output(self.out, force=force)
        is_folder = self.out.is_dir() and not self.out.is_symlink()
        if not os.path.lexists(self.out) or (is_folder and not any(self.out.iterdir())):
            self.folder.rename(self.out)
        else:
            replaced = identity(self.out)
            self._catalog.begin_staging(self.folder, self.out, self._plan, replaced)
            _exchange(self.folder, self.out)
            _remove(self.folder, replaced)
        fsync_folder(self.out.parent)

    def __enter__(self) -> "_Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()


def _remove(path: Path, known: str) -> None:
    """Delete what was replaced, unless something else took its place."""
    if identity(path) != known:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step, so that at no instant there is neither; in three where the system cannot."""
    at_cwd, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)  # Linux alone has it, and not on every file system
    if swap is not None and not swap(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{second.name}.", dir=second.parent)) / "replaced"
    try:
        second.rename(aside)
        try:
            first.rename(second)
        except OSError:
            aside.rename(second)
            raise
        aside.rename(first)
    finally:
        with suppress(OSError):  # not empty where what was moved aside could not be put back
            aside.parent.rmdir()


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise DeltaworksError(
            f"the merged model needs {needed:,} bytes and {out.parent} has {free:,} free; make room first"
        )


def _companion_names(plan: Plan, sidecars: Sequence[str], shards: Sequence[ShardLayout]) -> list[str]:
    """Names of the files that may be written beside the weights, except the manifest."""
    template = ["chat_template.jinja", "tokenizer_config.json"] if plan.chat_template is not None else []
    index = [INDEX] if len(shards) > 1 else []
    copied = [*sidecars, *code_names(plan)]
    return [*copied, *template, "config.json", *index, "README.md", RECIPE, PLAN]


def _write_companions(
    staging: _Staging, plan: Plan, models: Sequence[Model], sidecars: Sequence[str], shards: Sequence[ShardLayout]
) -> list[str]:
    """Write and flush everything beside the weights except the manifest.

    Args:
        staging: where they go; every name was claimed there.
        plan: what is executed.
        models: its models.
        sidecars: names of the files to copy from the tokenizer's model. One that was added since is not copied.
        shards: the weight files.

    Returns:
        The names of the files, sorted.

    Raises:
        CheckpointError: a file cannot be copied.
        DeltaworksError: a file cannot be written.
    """
    folder = staging.folder
    try:
        copy_files(models[plan.tokenizer].path, folder, sidecars)
        write_code(plan, models, folder)
        if plan.chat_template is not None:
            write_chat_template(folder, plan.chat_template)
        if plan.config:
            write_json(folder / "config.json", plan.config)
        if len(shards) > 1:
            total = sum(t.nbytes for s in shards for t in s.tensors)
            weight_map = {t.name: s.name for s in shards for t in s.tensors}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / "README.md").write_text(model_card(plan, staging.out.name), encoding="utf-8")
        (folder / RECIPE).write_text(plan.recipe, encoding="utf-8")
        save_plan(plan, folder / PLAN)
        others = [n for n in _companion_names(plan, sidecars, shards) if (folder / n).is_file()]
        for name in others:
            _flush(folder / name)
    except OSError as error:
        raise storage_error(Path(error.filename or folder), error) from error
    return sorted(set(others))


def _write_manifest(
    staging: _Staging, plan: Plan, shards: Sequence[ShardLayout], others: Sequence[str], *, equals_base: bool
) -> dict[str, Any]:
    """Write and flush the manifest; `others` are the files beside the weights."""
    folder = staging.folder
    manifest: dict[str, Any] = {
        "deltaworks_manifest": MANIFEST_VERSION,
        "plan_digest": plan.digest,
        "method": plan.method,
        "seed": plan.seed,
        "inputs": [m._asdict() for m in plan.models],
        "fingerprint": combine([s.name for s in shards], [staging.done[s.name] for s in shards]),
        "shards": [{"file": s.name, "bytes": s.nbytes, "blake3": staging.done[s.name]} for s in shards],
        "files": {name: blake3((folder / name).read_bytes()).hexdigest() for name in others},
        "budget_bytes": plan.budget_bytes,
        "expert_bytes": plan.expert_bytes,
        "expert_bytes_planned": plan.expert_bytes_planned,
        "predicted_error": plan.predicted_error,
        "error_bound": plan.error_bound,
        "expert_bytes_read": staging.reads.expert.value,
        "base_bytes_read": staging.reads.base.value,
        "accounting": list(plan.accounting),
        "notes": list(plan.notes),
        "equals_base": equals_base,
        "versions": {name: version(name) for name in ("deltaworks", "numpy", "numba")},
    }
    manifest[DIGEST] = manifest_digest(manifest)
    write_json(folder / MANIFEST, manifest)
    _flush(folder / MANIFEST)
    return manifest


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
