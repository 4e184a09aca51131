"""Enter models in the catalog, and notice when their files change."""

import re
from dataclasses import replace
from pathlib import Path

from deltaworks.catalog.fingerprint import combine, hash_files
from deltaworks.catalog.models import Kind, Model
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import Checkpoint, ShardFile, open_checkpoint, read_config
from deltaworks.checkpoints.comparison import Named, explain_difference, shapes_differ
from deltaworks.checkpoints.hub import resolve_source
from deltaworks.checkpoints.quantized import check_not_quantized, quantization
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import sidecar_names
from deltaworks.checkpoints.tensor_names import is_recomputed
from deltaworks.checkpoints.weight_files import SINGLE
from deltaworks.errors import CatalogError, ChangedError, CheckpointError, did_you_mean
from deltaworks.progress import Progress, Silent

NAME = re.compile(r"[\w][\w.@+-]*")


def register(
    catalog: Catalog,
    name: str,
    source: str,
    base: str | None = None,
    *,
    base_is_declared: bool = True,
    replace_existing: bool = False,
    relative_to: Path | None = None,
    progress: Progress | None = None,
) -> Model:
    """Enter the model at `source` under `name`.

    The kind is detected: a PEFT folder is an adapter, a model with `base` is an expert, any other is a base. Every
    weight file is read once, for its hash.

    Args:
        catalog: where to enter it.
        name: letters, digits, ``_ . @ + -``.
        source: a folder, or a hub id ``org/name[@revision]``.
        base: the base model, by name, path or hub id; registered too where it is not yet.
        base_is_declared: the user named `base`; merges against another base are refused from then on.
        replace_existing: let `name` mean another folder from now on.
        relative_to: a second folder in which paths are looked up.
        progress: told of the bytes hashed.

    Raises:
        CatalogError: the name is taken or malformed.
        CheckpointError: the folder is not a readable model, or its tensors are not its base's.
        ChangedError: a file was written meanwhile.
    """
    progress = progress or Silent()
    if not NAME.fullmatch(name):
        raise CatalogError(f"{name!r} cannot be a name; use letters, digits, and . _ @ + -")
    path = resolve_source(source, relative_to)
    known = catalog.find(name)
    if known is not None and known.path != path and not replace_existing:
        raise CatalogError(f"the name {name!r} is taken by {known.path}; choose another, or add --replace")
    checkpoint = open_checkpoint(path, ByteCounter())
    sidecar_names(path)  # refuses what no merge could copy
    how = None if checkpoint.is_adapter else quantization(checkpoint)
    if how is not None and base is None:
        progress.note(
            f"{name} is quantized ({how}); layers of it can be stacked by passthrough, and for any other merge take the"
            " unquantized model"
        )
    kind = Kind.ADAPTER if checkpoint.is_adapter else Kind.EXPERT if base is not None else Kind.BASE
    base_model = None if base is None else ensure_registered(catalog, base, relative_to=relative_to, progress=progress)
    if base_model is not None and kind is Kind.EXPERT:
        check_same_tensors(name, checkpoint, base_model)
    progress.start(f"fingerprint {name}", checkpoint.nbytes)
    digests = hash_files([path / s.name for s in checkpoint.shards], ByteCounter(), progress)
    progress.finish()
    of = base_model.name if base_model else None
    model = Model(
        name,
        kind,
        source,
        of,
        base_is_declared and of is not None,
        combine([s.name for s in checkpoint.shards], digests),
        checkpoint,
    )
    if not untouched(model):
        raise ChangedError(f"{path} changed while it was being read; register {name} again when it is complete")
    catalog.save_model(model)
    return model


def find_model(catalog: Catalog, name: str) -> Model:
    """The registered model called `name`.

    Raises:
        CatalogError: there is none; close names are suggested.
    """
    model = catalog.find(name)
    if model is None:
        hint = did_you_mean(name, catalog.names()) or "; `deltaworks list` shows what is registered"
        raise CatalogError(f"no model called {name!r} in the catalog at {catalog.path}{hint}")
    return model


def ensure_registered(
    catalog: Catalog,
    reference: str,
    base: str | None = None,
    *,
    relative_to: Path | None = None,
    progress: Progress | None = None,
) -> Model:
    """The model that `reference` means: a registered name, a folder or a hub id, registered now if it was not.

    Raises:
        CatalogError, CheckpointError: as `register`; or a name and a folder of that name are two models.
        ChangedError: it is registered and its files have changed since.
    """
    model = find_registered(catalog, reference, relative_to=relative_to)
    if model is None:
        name = _free_name(catalog, reference)
        return register(
            catalog, name, reference, base, base_is_declared=False, relative_to=relative_to, progress=progress
        )
    return check_unchanged(catalog, model, progress)


def find_registered(catalog: Catalog, reference: str, *, relative_to: Path | None = None) -> Model | None:
    """The model that `reference` means, as it was registered; None where there is one that is not registered.

    Raises:
        CatalogError, CheckpointError: as `ensure_registered`.
    """
    model = catalog.find(reference)
    if model is not None:
        for root in (Path(), relative_to):
            if root is not None and (folder := (root / reference).resolve()) != model.path and folder.is_dir():
                raise CatalogError(
                    f"{reference!r} is a registered name (of {model.path}) and a folder ({folder});"
                    f" write ./{reference} if you mean the folder, or work elsewhere"
                )
    if model is None:
        try:
            path = resolve_source(reference, relative_to)
        except CheckpointError as error:
            model = _find_gone(catalog, reference, relative_to)
            if model is None:
                raise CheckpointError(
                    f"{error}{did_you_mean(reference, catalog.names(), 'the registered ')}"
                ) from error
        else:
            model = catalog.find_path(path)
    return model


def _find_gone(catalog: Catalog, reference: str, relative_to: Path | None) -> Model | None:
    """The expert that was registered from a folder or a hub id that is there no longer, and is kept in layers."""
    if "\0" in reference:  # which no path has
        return None
    folders = {(root / reference).resolve() for root in (Path(), relative_to) if root is not None}
    for model in catalog.models():
        if (model.path in folders or model.source == reference) and catalog.kept_files(model.fingerprint) is not None:
            return model
    return None


def _free_name(catalog: Catalog, reference: str) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", Path(reference.partition("@")[0]).name).strip("-.+") or "model"
    taken = set(catalog.names())
    return next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def check_unchanged(catalog: Catalog, model: Model, progress: Progress | None = None) -> Model:
    """Make sure that a registered model's weight files are what they were.

    Untouched files cost one `stat` each. Files that were touched are hashed again; where they hold the same bytes,
    the catalog learns their new times and the model is returned with them. `config.json` may change; it is read anew.

    An expert whose files are gone comes from its layers, where the catalog keeps them; see `Model.is_gone`.

    Raises:
        ChangedError: a file is gone or holds other bytes.
    """
    progress = progress or Silent()
    again = f"; register it again: deltaworks register {model.name} {model.source}" + (
        f" --base {model.base}" if model.base else ""
    )
    try:
        now = tuple(ShardFile.of(model.path / s.name) for s in model.checkpoint.shards)
    except CheckpointError as error:
        kept = catalog.kept_files(model.fingerprint)
        if kept is not None:
            from deltaworks.catalog.kept import check_kept_files  # noqa: PLC0415  # slow to import, seldom needed

            check_kept_files(model.name, kept)
            progress.note(f"{model.path} is gone; {model.name} is read from its layers in the catalog")
            return replace(model, is_gone=True, checkpoint=replace(model.checkpoint, path=kept))
        raise ChangedError(f"a file of {model.name!r} is gone: {error}{again}") from error
    is_beside = SINGLE not in {s.name for s in now} and (model.path / SINGLE).is_file()
    if is_beside and not model.checkpoint.is_adapter:  # loaders of an adapter do not look at it
        raise ChangedError(
            f"{model.path / SINGLE} was put beside the weights that {model.name!r} was registered with, and loaders"
            f" prefer it; remove it, or the shards{again}"
        )
    known = (model.checkpoint.config, model.checkpoint.config_file)
    config, config_file = read_config(model.path, known, is_adapter=model.checkpoint.is_adapter)
    if now == model.checkpoint.shards and config_file == model.checkpoint.config_file:
        return model
    for old, new in zip(model.checkpoint.shards, now, strict=True):
        if old.size != new.size:
            raise ChangedError(f"{model.path / new.name} changed since {model.name!r} was registered{again}")
    if now != model.checkpoint.shards:
        progress.start(f"fingerprint {model.name} (its files were touched)", model.checkpoint.nbytes)
        digests = hash_files([model.path / s.name for s in now], ByteCounter(), progress)
        progress.finish()
        if combine([s.name for s in now], digests) != model.fingerprint:
            touched = next(new for old, new in zip(model.checkpoint.shards, now, strict=True) if old != new)
            raise ChangedError(f"{model.path / touched.name} changed since {model.name!r} was registered{again}")
    model = replace(model, checkpoint=replace(model.checkpoint, shards=now, config=config, config_file=config_file))
    catalog.save_model(model)
    return model


def base_of(catalog: Catalog, model: Model, chosen: str | None = None, *, progress: Progress | None = None) -> Model:
    """The base that `model` is taken against, unchanged: the `chosen` one, or the one it is registered with.

    Raises:
        CatalogError: it is a base or an adapter, and none is chosen.
        CheckpointError: its tensors are not those of the chosen base.
        ChangedError: the base's files have changed.
    """
    if model.kind is Kind.ADAPTER or (chosen is None and model.base is None):
        raise CatalogError(f"{model.name} is not an expert of a registered base; give the base with --base")
    if chosen is not None:
        base = ensure_registered(catalog, chosen, progress=progress)
        check_same_tensors(model.name, model.checkpoint, base)
        return base
    return check_unchanged(catalog, find_model(catalog, model.base or ""), progress)


def untouched(model: Model) -> bool:
    """Whether a model's weight files are, by size, times and inode, the ones that were registered."""
    try:
        return tuple(ShardFile.of(model.path / s.name) for s in model.checkpoint.shards) == model.checkpoint.shards
    except CheckpointError:
        return False


def check_same_tensors(name: str, expert: Checkpoint, base: Model) -> None:
    """Make sure that an expert's tensors match its base's in name and shape.

    A tied model may leave its `lm_head` out; that is not a difference. Neither are buffers that loaders compute.

    Raises:
        CheckpointError: they do not match, so it is not a fine-tune of that base.
    """
    check_not_quantized(name, expert)
    check_not_quantized(base.name, base.checkpoint)
    check_matching_tensors(name, expert, base)


def check_matching_tensors(name: str, expert: Checkpoint, base: Model) -> None:
    """As `check_same_tensors`, for models that are known not to be quantized."""
    theirs = base.checkpoint.tensors
    if difference := explain_difference(Named(base.name, theirs), Named(name, expert.tensors)):
        raise CheckpointError(f"{name} is not a fine-tune of {base.name}: {difference}")
    for tensor in expert.tensors.values():
        other = theirs.get(tensor.name)
        if other is not None and other.shape != tensor.shape and not is_recomputed(tensor):
            raise CheckpointError(
                f"{name} is not a fine-tune of {base.name}: "
                + shapes_differ(tensor.name, (base.name, other.shape), (name, tensor.shape))
            )
