"""Which tensors a recipe writes, and from which tensors of which models each is made."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.checkpoint import EMBEDDINGS, HEAD
from deltaworks.errors import CheckpointError, RecipeError
from deltaworks.merging.parameters import Settings
from deltaworks.merging.recipe import Recipe, Slice

_LAYER = re.compile(r"(?P<stack>(?:^|.*?\.)(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)(?P<rest>\..*)")
_FIRST = (*EMBEDDINGS, "wpe.weight", "embed_positions.weight", "embeddings.weight")


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

    Args:
        recipe: the recipe.
        models: the model behind every reference in it.

    Raises:
        RecipeError: a slice asks for layers that a model does not have.
        CheckpointError: a model lacks a tensor, or two models differ in a tensor's shape.
    """
    tensors = _sliced(recipe, models) if recipe.is_sliced else _whole(recipe.slices[0], recipe, models)
    for tensor in tensors:
        _check(tensor, models)
    return tensors


def _leader(part: Slice, recipe: Recipe, models: Mapping[str, Model]) -> Model:
    """The model whose tensors and order the output follows."""
    names = [i.model for i in part.inputs]
    base = part.base_model or recipe.base_model
    return models[base if base in names else names[0]]


def _whole(part: Slice, recipe: Recipe, models: Mapping[str, Model]) -> list[TensorRecipe]:
    names = list(_leader(part, recipe, models).checkpoint.tensors)
    for i in part.inputs:
        names += [n for n in models[i.model].checkpoint.tensors if n.endswith(HEAD) and n not in names]
    last = _last_layers(names)
    result = []
    for name in names:
        match = _LAYER.fullmatch(name)
        position = 0.0
        if match:
            end = last[match["stack"]]
            position = int(match["index"]) / end if end else 1.0
        result.append(TensorRecipe(name, (name,) * len(part.inputs), part, position))
    return result


def _last_layers(names: list[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            last[match["stack"]] = max(last.get(match["stack"], 0), int(match["index"]))
    return last


def _sliced(recipe: Recipe, models: Mapping[str, Model]) -> list[TensorRecipe]:
    first, final = recipe.slices[0], recipe.slices[-1]
    leader = _leader(first, recipe, models)
    last = _last_layers(list(leader.checkpoint.tensors))
    if len(last) != 1:
        raise RecipeError(
            f"slices need a model with one stack of layers; {leader.name} has {len(last)}: use models instead"
        )
    (stack,) = last
    before: list[TensorRecipe] = []
    after: list[TensorRecipe] = []
    outside = [n for n in leader.checkpoint.tensors if not _LAYER.fullmatch(n)]
    for i in (*first.inputs, *final.inputs):
        outside += [n for n in models[i.model].checkpoint.tensors if n.endswith(HEAD) and n not in outside]
    for name in outside:
        part, place = (first, before) if name.endswith(_FIRST) else (final, after)
        place.append(TensorRecipe(name, (name,) * len(part.inputs), part, 0.0))
    layers: list[TensorRecipe] = []
    out = 0
    for part in recipe.slices:
        ranges = [i.layers or (0, 0) for i in part.inputs]
        for i, (_, end) in zip(part.inputs, ranges, strict=True):
            own = _last_layers(list(models[i.model].checkpoint.tensors)).get(stack, -1) + 1
            if end > own:
                raise RecipeError(f"layer_range {list(i.layers or ())} of {i.model}: it has {own} layers")
        count = ranges[0][1] - ranges[0][0]
        lead = _leader(part, recipe, models)
        lead_first = ranges[[models[i.model].name for i in part.inputs].index(lead.name)][0]
        rests = _rests(lead, stack)
        for offset in range(count):
            position = offset / (count - 1) if count > 1 else 1.0
            for rest in rests[lead_first + offset]:
                sources = tuple(f"{stack}{start + offset}{rest}" for start, _ in ranges)
                layers.append(TensorRecipe(f"{stack}{out}{rest}", sources, part, position))
            out += 1
    return before + layers + after


def _rests(model: Model, stack: str) -> dict[int, list[str]]:
    rests: dict[int, list[str]] = {}
    for name in model.checkpoint.tensors:
        if (match := _LAYER.fullmatch(name)) and match["stack"] == stack:
            rests.setdefault(int(match["index"]), []).append(match["rest"])
    return rests


def layer_count(tensors: list[TensorRecipe]) -> int:
    """How many layers the largest stack of the output has."""
    return max(_last_layers([t.name for t in tensors]).values(), default=-1) + 1


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
            raise CheckpointError(
                f"tensor {tensor.name!r} is {list(shape)} in {owner} and {list(found.shape)} in {model.name};"
                " models can be merged only where shapes agree"
                + (" (align their vocabularies first)" if tensor.name.endswith((*EMBEDDINGS, HEAD)) else "")
            )
        shape, owner = found.shape, model.name
