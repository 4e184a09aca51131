"""Find the models of a recipe and their bases, and refuse those that cannot be merged."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from deltaworks.catalog.models import Kind, Model
from deltaworks.catalog.register import (
    check_matching_tensors,
    check_same_tensors,
    check_unchanged,
    ensure_registered,
    find_registered,
)
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.quantized import check_not_quantized, has_quantization_config, quantization
from deltaworks.errors import RecipeError
from deltaworks.merging.candidate import no_stand_in
from deltaworks.merging.recipe import Recipe
from deltaworks.progress import Progress


def find_models(
    catalog: Catalog, recipe: Recipe, stand_in: str | None, relative_to: Path | None, progress: Progress
) -> tuple[dict[str, Model], str | None]:
    """Find or register the models of a recipe, and refuse those that cannot be merged.

    Returns:
        The model behind every reference; and the reference of the stand-in, which may be that of a model of the recipe.

    Raises:
        RecipeError: a model is an adapter, or is named twice.
        CheckpointError: a model is quantized, or its tensors are not those of the base.
    """
    models: dict[str, Model] = {}
    for reference in dict.fromkeys([*recipe.models(), *([stand_in] if stand_in else [])]):
        # Slices may stack models of different depth, of which none need be a fine-tune of another.
        base = None if recipe.is_sliced else recipe.base_model or stand_in
        base = None if base == reference else base
        model = ensure_registered(catalog, reference, base, relative_to=relative_to, progress=progress)
        if model.kind is Kind.ADAPTER:
            raise RecipeError(
                f"{reference!r} is a LoRA adapter; a merge takes full models: fold it into its base first"
            )
        _check_quantized(recipe, model, progress)
        same = next((r for r, m in models.items() if m.name == model.name), None)
        if same is not None and reference == stand_in and reference not in recipe.models():
            stand_in = same
            continue
        if same is not None:
            raise RecipeError(f"{reference!r} and {same!r} are the same model ({model.path}); name it once")
        models[reference] = model
    base = None if recipe.is_sliced else recipe.base_model or stand_in
    if base is not None:
        # A new model was checked when it was registered; the same must hold for the others.
        _check_tensors(recipe, models, [(reference, base) for reference in models if reference != base])
    return models, stand_in


def check_stand_in(catalog: Catalog, recipe: Recipe, stand_in: str | None, relative_to: Path | None) -> None:
    """Refuse a budget for new experts of which nobody says the base, before they are read to be registered."""
    if stand_in is not None or recipe.base_model is not None or any(part.base_model for part in recipe.slices):
        return
    new = [r for r in recipe.models() if find_registered(catalog, r, relative_to=relative_to) is None]
    if new:
        raise RecipeError(no_stand_in(", ".join(new), "no known base"))


def check_bases(catalog: Catalog, recipe: Recipe, models: Mapping[str, Model]) -> None:
    """Refuse an expert that was registered as a fine-tune of another base than the recipe's."""
    if not recipe.method.needs_base or recipe.method.name == "slerp":
        return  # slerp takes no deltas: its base model is just the first of two
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


def _check_quantized(recipe: Recipe, model: Model, progress: Progress) -> None:
    """Refuse to calculate with quantized weights; to pass them through as they are is not a calculation."""
    scales = [i.parameters for part in recipe.slices for i in part.inputs]
    scales += [recipe.parameters, *(part.parameters for part in recipe.slices)]
    wanted = recipe.out_dtype or recipe.dtype
    converts = wanted is not None and any(
        t.dtype.is_float and t.dtype != wanted for t in model.checkpoint.tensors.values()
    )
    if recipe.method.name != "passthrough" or converts or any("scale" in settings for settings in scales):
        check_not_quantized(model.name, model.checkpoint)
    if has_quantization_config(model.checkpoint.config) and quantization(model.checkpoint) is None:
        progress.note(
            f"the config.json of {model.name} tells of quantization and its weights are plain; they are merged as they"
            " are, and the result's config.json does not tell of it"
        )


def find_bases(
    catalog: Catalog,
    recipe: Recipe,
    models: dict[str, Model],
    stand_in: str | None,
    progress: Progress,
    *,
    weighs: bool,
    adds: bool,
) -> dict[str, str]:
    """The reference of the base of each expert, as far as known; an expert with several bases is left out.

    Args:
        catalog: where the models are registered.
        recipe: what is merged.
        models: the model behind every reference.
        stand_in: the reference of the model that stands in for blocks that are not read; None for each expert's base.
        progress: told of what is noteworthy.
        weighs: check what a budget needs.
        adds: bases that the recipe does not name are added to `models`.

    Raises:
        RecipeError: an expert has two bases, and `weighs` is set.
        CheckpointError: its tensors are not those of its base, and `weighs` is set.
    """
    found: dict[str, list[str]] = {}
    for part in recipe.slices:
        named = part.base_model or recipe.base_model
        for item in part.inputs:
            base = stand_in or named
            if recipe.method.name == "slerp" and named is not None and base == named:
                # Interpolating between two experts, of which the recipe has to call one the base.
                base = _registered_base(catalog, models, named, progress, add=adds) or named
            elif base is None:
                base = _registered_base(catalog, models, item.model, progress, add=adds)
            if base is None or item.model == base:
                continue
            own = found.setdefault(item.model, [])
            if base not in own:
                own.append(base)
            if weighs and len(own) > 1:
                raise RecipeError(
                    f"{item.model} is merged against {own[0]} in one slice and {base} in another; a budget needs one"
                    " base of each expert"
                )
    bases = {expert: own[0] for expert, own in found.items() if len(own) == 1}
    if weighs:
        checked = None if recipe.is_sliced else recipe.base_model or stand_in
        _check_tensors(recipe, models, [(expert, base) for expert, base in bases.items() if base != checked])
    return bases


def _check_tensors(recipe: Recipe, models: Mapping[str, Model], pairs: Iterable[tuple[str, str]]) -> None:
    """Check that the tensors of experts match those of their bases, both given by reference."""
    for expert, base in pairs:
        if recipe.method.name == "passthrough":
            check_same_tensors(models[expert].name, models[expert].checkpoint, models[base])
        else:  # quantized models were refused already
            check_matching_tensors(models[expert].name, models[expert].checkpoint, models[base])


def _registered_base(
    catalog: Catalog, models: dict[str, Model], reference: str, progress: Progress, *, add: bool
) -> str | None:
    """The reference of the base that a model is registered with; it joins `models` where `add` is set."""
    model = models[reference]
    base = catalog.find(model.base) if model.base else None
    if base is None:
        return None
    for known, other in models.items():
        if other.fingerprint == base.fingerprint:
            return known
    if not add:
        return None
    models[base.name] = check_unchanged(catalog, base, progress)
    return base.name
