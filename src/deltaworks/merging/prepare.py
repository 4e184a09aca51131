"""Everything a plan needs to be true first: models registered and unchanged, deltas analyzed, trims placed."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.cuts import find_cuts
from deltaworks.catalog.histogram import Cut
from deltaworks.catalog.models import Kind, Model
from deltaworks.catalog.register import check_unchanged, ensure_registered
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.sidecars import chat_template, vocabulary
from deltaworks.errors import ChangedError, NonFiniteError, RecipeError
from deltaworks.merging.plan import Plan
from deltaworks.merging.planner import DEFAULT_SHARD_BYTES, Trim, make_plan, required_trims
from deltaworks.merging.recipe import Recipe
from deltaworks.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge, beyond what the recipe says.

    Attributes:
        shard_bytes: largest amount of data in one output file.
        seed: what random methods start from.
        block_size: elements streamed at once, a power of two from 4 Ki to 4 Mi; None for 256 Ki.
        threads: compute threads; None for all cores.
        allow_nonfinite: write NaN and infinity instead of failing.
    """

    shard_bytes: int = DEFAULT_SHARD_BYTES
    seed: int = 0
    block_size: int | None = None
    threads: int | None = None
    allow_nonfinite: bool = False


def prepare_plan(
    catalog: Catalog,
    recipe: Recipe,
    options: MergeOptions | None = None,
    *,
    relative_to: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Register and analyze what `recipe` needs, and plan it.

    A delta that the catalog has statistics of is not read again.

    Raises:
        RecipeError, CheckpointError, CatalogError, ChangedError: something does not fit.
        NonFiniteError: an expert to be trimmed holds NaN or infinity.
    """
    options, progress = options or MergeOptions(), progress or Silent()
    for warning in recipe.warnings:
        progress.note(warning)
    models = _models(catalog, recipe, relative_to, progress)
    _check_bases(catalog, recipe, models)
    cuts = _cuts(catalog, recipe, models, options, progress)
    plan = make_plan(
        recipe,
        models,
        cuts,
        tokenizer=_tokenizer(recipe, models),
        chat_template=_template(recipe, models),
        shard_bytes=options.shard_bytes,
        seed=options.seed,
    )
    catalog.save_plan(plan.digest, json.dumps(plan.to_json()))
    return plan


def plan_inputs(catalog: Catalog, plan: Plan, progress: Progress | None = None) -> list[Model]:
    """The models a plan was made for, registered where this catalog does not know them.

    Raises:
        ChangedError: a model is not what it was when the plan was made.
    """
    found = []
    for planned in plan.models:
        known = catalog.find(planned.name)
        if known is not None and known.fingerprint == planned.fingerprint:
            model = check_unchanged(catalog, known, progress)
        else:
            model = ensure_registered(catalog, planned.reference, progress=progress)
        if model.fingerprint != planned.fingerprint:
            raise ChangedError(
                f"{model.path} changed since the plan was made (fingerprint {model.fingerprint[:12]},"
                f" planned {planned.fingerprint[:12]}); make the plan again"
            )
        found.append(model)
    return found


def _models(catalog: Catalog, recipe: Recipe, relative_to: Path | None, progress: Progress) -> dict[str, Model]:
    models: dict[str, Model] = {}
    for reference in recipe.models():
        # Slices may stack models of different depth, of which none need be a fine-tune of another.
        base = None if recipe.is_sliced or reference == recipe.base_model else recipe.base_model
        model = ensure_registered(catalog, reference, base, relative_to=relative_to, progress=progress)
        if model.kind is Kind.ADAPTER:
            raise RecipeError(
                f"{reference!r} is a LoRA adapter; a merge takes full models: fold it into its base first"
            )
        _check_quantized(recipe, model)
        same = next((r for r, m in models.items() if m.name == model.name), None)
        if same is not None:
            raise RecipeError(f"{reference!r} and {same!r} are the same model ({model.path}); name it once")
        models[reference] = model
    return models


def _check_bases(catalog: Catalog, recipe: Recipe, models: Mapping[str, Model]) -> None:
    """Refuse an expert that was registered as a fine-tune of another base than the recipe's."""
    if not recipe.method.needs_base:
        return
    for part in recipe.slices:
        base = models[part.base_model or recipe.base_model or ""]
        for item in part.inputs:
            model = models[item.model]
            declared = catalog.find(model.base) if model.base and model.base_is_declared else None
            if model is not base and declared is not None and declared.fingerprint != base.fingerprint:
                raise RecipeError(
                    f"{model.name} is registered as an expert of {declared.name}, and the recipe merges deltas against"
                    f" {base.name}; correct base_model, or register it again with --base {base.name}"
                )


def _check_quantized(recipe: Recipe, model: Model) -> None:
    """Refuse to average 8-bit weights that mean something only together with their scales."""
    tensors = model.checkpoint.tensors
    scales = [n for n in tensors if n.endswith(("_scale", "_scale_inv"))]
    if scales and recipe.method.name != "passthrough" and any(t.dtype.bits == 8 for t in tensors.values()):
        raise RecipeError(
            f"{model.name} holds quantized weights with scales (like {scales[0]!r}), which cannot be averaged;"
            " merge the unquantized model"
        )


def _cuts(
    catalog: Catalog, recipe: Recipe, models: Mapping[str, Model], options: MergeOptions, progress: Progress
) -> dict[Trim, Cut]:
    by_delta: dict[tuple[str, str], list[Trim]] = {}
    for trim in required_trims(recipe, models):
        by_delta.setdefault((trim.expert, trim.base), []).append(trim)
    cuts: dict[Trim, Cut] = {}
    for (expert, base), trims in by_delta.items():
        summary = analyze(
            catalog,
            models[expert],
            models[base],
            block_size=options.block_size,
            threads=options.threads,
            progress=progress,
        )
        if summary["nonfinite"]:
            raise NonFiniteError(
                f"{models[expert].name} has NaN or infinity in {len(summary['nonfinite'])} tensors"
                f" (first: {summary['nonfinite'][0]!r}), so its largest changes cannot be told;"
                " mend or leave out this expert"
            )
        found = find_cuts(catalog, models[expert], models[base], [(t.tensor, t.keep) for t in trims], progress)
        cuts |= {t: found[t.tensor, t.keep] for t in trims}
    return cuts


def _tokenizer(recipe: Recipe, models: Mapping[str, Model]) -> str | None:
    source = recipe.tokenizer_source
    if source is None:
        return None
    donor = recipe.base_model if source == "base" else next(iter(models)) if source == "union" else source
    if donor is None:
        raise RecipeError("tokenizer_source: base needs a base_model")
    if donor not in models:
        raise RecipeError(f"tokenizer_source: {donor!r} is not one of the models of the recipe")
    wanted = vocabulary(models[donor].path)
    for reference, model in models.items():
        if vocabulary(model.path) != wanted:
            raise RecipeError(
                f"tokenizer_source: {reference!r} has another vocabulary than {donor!r}; rows of embeddings cannot be"
                " matched up here: align the vocabularies first"
            )
    return donor


def _template(recipe: Recipe, models: Mapping[str, Model]) -> str | None:
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        found = Counter(t.strip() for m in models.values() if (t := chat_template(m.path)))
        return found.most_common(1)[0][0] if found else None
    if "{" not in wanted:
        raise RecipeError(f"chat_template: expected a Jinja template or 'auto', not {wanted!r}")
    return wanted
