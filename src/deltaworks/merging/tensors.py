"""List the tensors that a recipe writes, and the tensors of the models that each is made from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.comparison import Named, explain_difference, shapes_differ
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.tensor_names import HEAD, LAYER, is_embeddings, is_recomputed
from deltaworks.errors import CheckpointError, RecipeError
from deltaworks.merging.layer_entries import Taken
from deltaworks.merging.parameters import Settings
from deltaworks.merging.recipe import Recipe, Slice

_POSITIONS = ("wpe.weight", "embed_positions.weight", "embeddings.weight")
"""Ends of names of what is added to the embeddings before the first layer."""


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """An output tensor before parameters are resolved.

    Attributes:
        name: its name in the output.
        sources: the tensor's name in each input of `part`, in order.
        part: the slice it belongs to.
        position: its place in the slice for gradients, 0 first layer to 1 last.
    """

    name: str
    sources: tuple[str, ...]
    part: Slice
    position: float

    def settings(self, recipe: Recipe, model: int | None = None) -> Iterator[Settings]:
        """Settings in order of precedence: the model's own, the slice's, the recipe's."""
        if model is not None:
            yield self.part.inputs[model].parameters
        yield self.part.parameters
        yield recipe.parameters


def output_tensors(recipe: Recipe, models: Mapping[str, Model]) -> list[TensorRecipe]:
    """Every tensor that `recipe` writes, in the order of the first model's files.

    Buffers that loaders compute are left out where the models do not agree on them.

    Args:
        recipe: the recipe.
        models: the model behind every reference in it.

    Raises:
        RecipeError: a slice asks for layers that a model does not have.
        CheckpointError: a model has a tensor that another lacks, or two models differ in a tensor's shape.
    """
    tensors = _sliced(recipe, models) if recipe.is_sliced else _whole(recipe.slices[0], recipe, models)
    tensors = [t for t in tensors if not _is_dispensable(t, models)]
    for tensor in tensors:
        _check(tensor, models)
    return tensors


def _leader(part: Slice, recipe: Recipe, models: Mapping[str, Model]) -> Model:
    """The model whose tensors and order the output follows."""
    names = [i.model for i in part.inputs]
    base = part.base_model or recipe.base_model
    return models[base if base in names else names[0]]


def _whole(part: Slice, recipe: Recipe, models: Mapping[str, Model]) -> list[TensorRecipe]:
    leader = _leader(part, recipe, models)
    inputs = [models[i.model] for i in part.inputs]
    if any(explain_difference(_named(leader), _named(m)) for m in inputs):
        # The pair that is named does not depend on the order of the recipe.
        inputs.sort(key=lambda m: m.name)
        against_base = [(leader, m) for m in inputs] if recipe.base_model else []
        for one, other in (*against_base, *combinations(inputs, 2)):
            if difference := explain_difference(_named(one), _named(other)):
                raise CheckpointError(difference)
    names = list(leader.checkpoint.tensors)
    for i in part.inputs:
        names += [n for n in models[i.model].checkpoint.tensors if n.endswith(HEAD) and n not in names]
    last = _last_layers(names)
    result = []
    for name in names:
        match = LAYER.fullmatch(name)
        position = 0.0
        if match:
            end = last[match["stack"]]
            position = int(match["index"]) / end if end else 1.0
        result.append(TensorRecipe(name, (name,) * len(part.inputs), part, position))
    return result


def _last_layers(names: Iterable[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            last[match["stack"]] = max(last.get(match["stack"], 0), int(match["index"]))
    return last


def _sliced(recipe: Recipe, models: Mapping[str, Model]) -> list[TensorRecipe]:
    first, final = recipe.slices[0], recipe.slices[-1]
    leader = _leader(first, recipe, models)
    last = _last_layers(leader.checkpoint.tensors)
    if len(last) != 1:
        raise RecipeError(
            f"slices need a model with one stack of layers; {leader.name} has {len(last)}: use models instead"
        )
    (stack,) = last
    before: list[TensorRecipe] = []
    after: list[TensorRecipe] = []
    outside = [n for n in leader.checkpoint.tensors if not LAYER.fullmatch(n)]
    for part in (first, final):
        ours = _outside(leader, part, recipe)
        for i in part.inputs:
            if difference := explain_difference(ours, _outside(models[i.model], part, recipe)):
                raise CheckpointError(difference)
    for i in (*first.inputs, *final.inputs):
        outside += [n for n in models[i.model].checkpoint.tensors if n.endswith(HEAD) and n not in outside]
    for name in outside:
        part, place = (first, before) if _is_first(name) else (final, after)
        place.append(TensorRecipe(name, (name,) * len(part.inputs), part, 0.0))
    layers: list[TensorRecipe] = []
    out = 0
    for part in recipe.slices:
        ranges = [i.layers or (0, 0) for i in part.inputs]
        for i, (_, end) in zip(part.inputs, ranges, strict=True):
            own = _last_layers(models[i.model].checkpoint.tensors).get(stack, -1) + 1
            if not own and (difference := explain_difference(_named(leader), _named(models[i.model]))):
                raise CheckpointError(difference)
            if end > own:
                raise RecipeError(f"layer_range {list(i.layers or ())} of {i.model}: it has {own} layers")
        count = ranges[0][1] - ranges[0][0]
        lead = _leader(part, recipe, models)
        lead_first = ranges[[models[i.model].name for i in part.inputs].index(lead.name)][0]
        rests = {i.model: _rests(models[i.model], stack) for i in part.inputs}
        own_rests = _rests(lead, stack)
        for offset in range(count):
            position = offset / (count - 1) if count > 1 else 1.0
            ours = Named(f"layer {lead_first + offset} of {lead.name}", own_rests.get(lead_first + offset, {}))
            for i, (start, _) in zip(part.inputs, ranges, strict=True):
                theirs = Named(
                    f"layer {start + offset} of {models[i.model].name}", rests[i.model].get(start + offset, {})
                )
                if difference := explain_difference(ours, theirs):
                    raise CheckpointError(difference)
            for rest in ours.tensors:
                sources = tuple(f"{stack}{start + offset}.{rest}" for start, _ in ranges)
                layers.append(TensorRecipe(f"{stack}{out}.{rest}", sources, part, position))
            out += 1
    return before + layers + after


def _named(model: Model) -> Named:
    return Named(model.name, model.checkpoint.tensors)


def _outside(model: Model, part: Slice, recipe: Recipe) -> Named:
    """The tensors outside the layers of a model that the first or the last slice makes those of the output from."""
    chosen = {
        name: tensor
        for name, tensor in model.checkpoint.tensors.items()
        if not LAYER.fullmatch(name) and (part is recipe.slices[0] if _is_first(name) else part is recipe.slices[-1])
    }
    return Named(model.name, chosen)


def _rests(model: Model, stack: str) -> dict[int, dict[str, TensorInfo]]:
    """The tensors of each layer of a model, by their names inside the layer."""
    rests: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in model.checkpoint.tensors.items():
        if (match := LAYER.fullmatch(name)) and match["stack"] == stack:
            rests.setdefault(int(match["index"]), {})[match["rest"][1:]] = tensor
    return rests


def _is_dispensable(tensor: TensorRecipe, models: Mapping[str, Model]) -> bool:
    """Whether an output tensor is a buffer that loaders compute, and that the models do not agree on."""
    found = [models[i.model].checkpoint.find(s) for s, i in zip(tensor.sources, tensor.part.inputs, strict=True)]
    held = [t for t in found if t is not None]
    if not any(is_recomputed(t) for t in held):
        return False
    is_float = all(t.dtype.is_float for t in held)
    return len(held) < len(found) or len({(t.shape, None if is_float else t.dtype) for t in held}) > 1


def layers_taken(recipe: Recipe, models: Mapping[str, Model]) -> list[Taken]:
    """What each layer of the output of a recipe with slices is made from."""
    taken = []
    for part in recipe.slices:
        lead = _leader(part, recipe, models)
        inputs = sorted(part.inputs, key=lambda i: models[i.model] is not lead)
        first, end = inputs[0].layers or (0, 0)
        taken += [tuple((i.model, (i.layers or (0, 0))[0] + n) for i in inputs) for n in range(end - first)]
    return taken


def layer_count(names: Iterable[str]) -> int:
    """How many layers the largest stack among tensors has."""
    return max(_last_layers(names).values(), default=-1) + 1


def _check(tensor: TensorRecipe, models: Mapping[str, Model]) -> None:
    shape, owner = None, ""
    for source, item in zip(tensor.sources, tensor.part.inputs, strict=True):
        model = models[item.model]
        found = model.checkpoint.find(source)
        if found is None:
            raise CheckpointError(
                f"{model.name} ({model.path}) lacks the tensor {source!r}; is it a fine-tune of the same base?"
            )
        if shape is not None and found.shape != shape:
            raise CheckpointError(shapes_differ(tensor.name, (owner, shape), (model.name, found.shape)))
        shape, owner = found.shape, model.name


def _is_first(name: str) -> bool:
    """Whether a tensor outside of the layers comes before the first of them."""
    return is_embeddings(name) or name.endswith(_POSITIONS)
